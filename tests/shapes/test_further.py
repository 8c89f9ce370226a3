"""What is learned further: its prompts are those of the tasks, to the token, and nothing of it is held out."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scripted import scripted

from llada2_mlx import prompts, story, tasks
from llada2_mlx.backbone.acceptance import Sampling
from llada2_mlx.backbone.handle import Backbone
from llada2_mlx.backbone.session import Session
from llada2_mlx.checkpoint.layout import BUILT_IN, Checkpoint
from llada2_mlx.shapes.grammar import caption, plan
from llada2_mlx.shapes.several import About, pair_question
from llada2_mlx.shapes.studio import Studio
from llada2_mlx.shapes.training import __main__ as trainer
from llada2_mlx.shapes.training import backbone, curriculum, data, export, further, loop, packed, tokenizer
from llada2_mlx.shapes.training.text import add_words, further_sentences, sentences
from llada2_mlx.shapes.world import (
    SUMMARY,
    Background,
    Colour,
    Kind,
    Pattern,
    Place,
    Scene,
    Shape,
    Size,
    Tone,
    Variation,
    held_out,
    held_out_pair,
)
from llada2_mlx.tokens import Tokens
from llada2_mlx.vq import GridSet


def clean(sequence: packed.Packed, group: int = 0) -> dict[int, int]:
    """Position -> id of the clean tokens that a group sees."""
    return {
        position: token
        for position, token, noisy, own in zip(
            sequence.positions, sequence.ids, sequence.noisy, sequence.groups, strict=True
        )
        if not noisy and own in (0, group)
    }


def learned(sequence: packed.Packed) -> list[tuple[int, int]]:
    """Position and id of what is to be learned."""
    return [(at, token) for at, token in zip(sequence.positions, sequence.targets, strict=True) if token >= 0]


def whole(sequence: packed.Packed, ids: list[int]) -> None:
    """Check that the clean tokens are ``ids``, as far as they go."""
    seen = clean(sequence)
    assert len(ids) - packed.BLOCK <= len(seen) and list(seen) == list(range(len(seen)))
    assert all(seen[at] == token for at, token in enumerate(ids[: len(seen)]))


@pytest.fixture(scope="module")
def scripts(folder: Path, further_lessons) -> Backbone:
    """A backbone with the tokenizer of the lessons, to be given scripts."""
    own = further_lessons.tokens.folder
    shutil.copy(folder / "model.safetensors", own)
    return Backbone(Checkpoint(own), "float32")


@pytest.fixture
def seen(scripts: Backbone, monkeypatch: pytest.MonkeyPatch):
    """Let the backbone write a sequence, and give all ids that its network then sees of the conditional branch."""

    def watch(ids: list[int]) -> list[tuple[int, int]]:
        scripted(scripts, [], ids, monkeypatch)
        network, found = scripts.load(), []
        call = type(network).__call__

        def seeing(self, given, start=0, mask=None, cache=None):
            found.extend(enumerate(given[0].tolist(), start))
            return call(self, given, start, mask, cache)

        monkeypatch.setattr(type(network), "__call__", seeing)
        return found

    return watch


def test_new_words_are_tokens_at_ids_that_were_free_and_nothing_else_changes(tmp_path: Path) -> None:
    first = tmp_path / "first"
    shutil.copytree(BUILT_IN, first, ignore=shutil.ignore_patterns("*.safetensors", "mlx-*"))
    export.write_text(first, backbone.CONFIG, trainer.SIZES, sentences(), SUMMARY)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(first / name, tmp_path)
    old, path = Tokens(Checkpoint(first)), tmp_path / "tokenizer.json"
    words = add_words(path, backbone.TEXT_IDS, further_sentences())
    new = Tokens(Checkpoint(tmp_path))
    assert 50 < len(words) and max(words) < backbone.TEXT_IDS and min(words) > max(old._vocabulary.values())
    assert old._vocabulary.items() <= new._vocabulary.items() and len(new._vocabulary) == len(old._vocabulary) + len(
        words
    )
    for text in islice(sentences(), 3000):
        assert new.encode(text) == old.encode(text) and new.encode_text(text) == old.encode_text(text)
    for special in ("<|image|>", "<boi>", "<role>HUMAN</role>", "<|reserved_token_8|>"):
        assert new.encode(special) == old.encode(special) and new.encode_text(special) == old.encode_text(special)
    for text in islice(further_sentences(), 500):
        assert new.decode(new.encode_text(text)) == text
        if not text.startswith(" You are"):
            assert new.doubt(text) is None, text
    assert new.doubt("Put the dog of the first picture into the second.").split(":")[1].startswith(" dog.")
    assert old.doubt("Put the ring of the first picture into the second.")  # not said to be known before it is
    for word, pieces in words.items():
        assert old.decode(pieces) == new.decode([word])
    assert add_words(path, backbone.TEXT_IDS, further_sentences()) == {}
    with pytest.raises(ValueError, match="do not fit"):
        add_words(path, backbone.TEXT_IDS, (f"word{number}" for number in range(500)))


def test_a_plan_is_what_thinking_writes_and_draws_from(further_lessons, scripts: Backbone, seen) -> None:
    tokens, rng, example = further_lessons.tokens, random.Random(0), further_lessons.examples[0]
    text, checked = caption(example.scene, rng), 0
    for number in range(12):
        sequence = further_lessons._planned(example.scene, example.small, text, random.Random(number))
        conditional, unconditional = prompts.thinking(tokens, text, 8, 8).branches
        header, codes = tokens.header(8, 8), tokens.codes_to_ids(curriculum.flat(example.small))
        ids = [*conditional, *tokens.encode(plan(example.scene)), *header, *codes]
        if sequence.begin:
            session = Session.begin((ids[: -len(codes)], unconditional), packed.BLOCK, None)
            assert (
                sequence.begin == session.begins[1]
                and list(clean(sequence).values())[: len(unconditional)] == unconditional
            )
            continue
        whole(sequence, ids)
        assert all(ids[at] == token for at, token in learned(sequence) if at < len(ids))
        checked += 1
    assert checked > 6
    found = seen(ids)
    drawing = tasks.text_to_vq(
        scripts, text, guidance=1.0, thinking=tasks.Thinking(steps=4, length=96), sampling=Sampling(steps=4)
    )
    assert drawing.reasoning == plan(example.scene) and drawing.grid.codes.tolist() == example.small
    known = dict(enumerate(ids))
    assert {token for at, token in found if at in known and token != known[at]} == {tokens.mask}


def test_a_story_is_what_the_task_tells(further_lessons, scripts: Backbone, seen) -> None:
    tokens, told = further_lessons.tokens, further_lessons.material.tales[0]
    assert len(told.codes) == 3
    sequence = further_lessons._story(told, random.Random(0))
    ids, pieces = further_lessons._written(told)
    whole(sequence, ids)
    found = seen(ids)
    options = {"rescale": 0.0, "text": 256, "text_steps": 4, "text_guidance": 1.0, "image_guidance": 0.0}
    given = story.tell(scripts, told.tale.prompt, sampling=Sampling(steps=4), **options)
    assert given.texts == list(told.tale.texts) and not given.warnings
    assert [grid.codes.tolist() for grid in given.grids] == list(told.codes)
    # behind a picture its last block has codes that are thrown away, as in the lessons
    ends = [piece.start + len(piece.ids) - 1 for piece in pieces if piece.codes]
    behind = {at for end in ends for at in range(end, -(-end // packed.BLOCK) * packed.BLOCK)}
    other = {(at in behind, token) for at, token in found if at < len(ids) and token != ids[at]}
    assert (False, tokens.mask) in other and {token for thrown, token in other if not thrown} == {tokens.mask}
    # texts and codes are learned, and the end is; behind a picture stand codes, as the task has them there
    for group, piece in enumerate(pieces, 1):
        own = range(piece.start, piece.start + len(piece.ids) - (piece.codes is not None))
        taught = [
            (at, token)
            for at, token, each in zip(sequence.positions, sequence.targets, sequence.groups, strict=True)
            if each == group and token >= 0
        ]
        assert {at for at, _ in taught} & set(own)
        for at, token in taught:
            assert (
                token == ids[at]
                if at in own or piece.codes is None and at < len(ids)
                else (token >= backbone.TEXT_IDS if piece.codes else token == tokens.end)
            )


def test_each_picture_of_a_story_has_the_branches_of_its_guidance(further_lessons) -> None:
    tokens = further_lessons.tokens
    for told in further_lessons.material.tales:
        ids, pieces = further_lessons._written(told)
        for picture in range(len(told.codes)):
            text, drawn = pieces[2 * picture], pieces[2 * picture + 1]
            branches = prompts.story_picture(
                tokens, ids[: text.start], text.ids[:-4], tokens.header(8, 8), first=not picture
            ).branches
            assert branches[0] == ids[: drawn.start]
            made = further_lessons._story_picture(told, picture, random.Random(picture))
            assert [sequence.branch for sequence in made] == list(range(3 if picture else 2))
            begins = Session.begin(branches, packed.BLOCK, None).begins
            for sequence, branch, begin in zip(made, branches, begins, strict=True):
                seen = clean(sequence)
                assert sequence.begin == begin and min(seen) == begin
                end = [seen[at] for at in range(begin, min(len(branches[0]), len(seen) + begin))]
                assert end == branch[len(branch) - (len(branches[0]) - begin) :][: len(end)]
                assert learned(sequence) == learned(made[0])
            # each code looks at the same place of the picture before, and there alone
            for sequence in made[: 2 if picture else 0]:
                before = tokens.codes_to_ids(curriculum.flat(told.codes[picture - 1]))
                for index, source in enumerate(sequence.sources):
                    if source >= 0:
                        cell = divmod(sequence.cells[index], packed.SIDES)
                        assert sequence.ids[source] == before[8 * cell[0] + cell[1]]


def test_questions_about_two_pictures_are_those_of_the_task(further_lessons, monkeypatch) -> None:
    tokens, pair = further_lessons.tokens, further_lessons.examples[:2]
    both, codes = (pair[0].scene, pair[1].scene), [pair[0].large, pair[1].small]
    possible = []

    def recorded(*given):
        made = pair_question(*given)
        possible.append(made)
        return made

    monkeypatch.setattr(further, "pair_question", recorded)
    sequence = further_lessons._questions_about_two(both, codes, random.Random(0))
    pictures = GridSet(tuple(map(curriculum.grid_of, codes)))
    given = prompts.blocks(tokens, pictures)
    asked = set()
    for group in set(sequence.groups) - {0}:
        seen = clean(sequence, group)
        noisy = {
            at: target if target >= 0 else token
            for at, token, target, own, hidden in zip(
                sequence.positions, sequence.ids, sequence.targets, sequence.groups, sequence.noisy, strict=True
            )
            if own == group and hidden
        }
        ids = [(seen | noisy)[at] for at in range(max(noisy) + 1)]
        assert ids[: len(given)] == given
        asked.add(tokens.decode(ids[len(given) :]))
    told = {f"{question.text}{question.answer}" for question in possible if question}
    assert len(asked) == curriculum.QUESTIONS and all(any(text.startswith(each) for each in told) for text in asked)
    # the codes of each picture tell of its own shapes
    for index, bits in enumerate(sequence.parts):
        if bits:
            picture = int(sequence.positions[index] >= len(prompts.blocks(tokens, curriculum.grid_of(codes[0]))))
            assert bits in {packed.part(shape.place, picture) for shape in both[picture].shapes}


def test_two_pictures_without_a_fair_question_of_a_kind_are_asked_another(further_lessons) -> None:
    def alone(colour: Colour, place: Place) -> Scene:
        ring = Shape(Kind.RING, colour, place, Size.SMALL, Variation())
        return Scene((ring,), Background(Pattern.PLAIN, Tone.GREY))

    # only colours tell which picture has which, and both names are held out where the other ring is
    both = alone(Colour.YELLOW, Place.BOTTOM_RIGHT), alone(Colour.BLACK, Place.BOTTOM_LEFT)
    which = [pair_question(both, About.WHICH, random.Random(seed)) for seed in range(40)]
    assert not any(further.fair_of_two(question, both) for question in which)
    for seed in range(6):
        sequence = further_lessons._questions_about_two(
            both, [each.small for each in further_lessons.examples[:2]], random.Random(seed)
        )
        assert len(set(sequence.groups) - {0}) == curriculum.QUESTIONS


def test_an_edit_with_a_reference_has_the_branches_of_the_task(further_lessons) -> None:
    tokens = further_lessons.tokens
    for number, given in enumerate(further_lessons.material.loans):
        pictures = GridSet(tuple(map(curriculum.grid_of, given.codes[:2])))
        branches = prompts.edit(tokens, pictures, given.made.instruction).branches
        made = further_lessons._borrow(given, random.Random(number))
        begins = Session.begin(branches, packed.BLOCK, None).begins
        for sequence, branch, begin in zip(made, branches, begins, strict=False):
            seen = clean(sequence)
            assert sequence.begin == begin
            end = [seen[at] for at in range(begin, min(len(branches[0]), len(seen) + begin))]
            assert end == branch[: len(end)] and learned(sequence) == learned(made[0])
        source, first = (tokens.codes_to_ids(curriculum.flat(codes)) for codes in (given.codes[1], given.codes[0]))
        for index, at in enumerate(made[0].sources):
            if at >= 0:
                row, column = divmod(made[0].cells[index], packed.SIDES)
                assert made[0].ids[at] == source[8 * row + column]
        if given.made.taken:
            moved = {made[0].ids[at] for at in made[0].moved if at >= 0}
            places = [i for i, place in enumerate(curriculum.places(8)) if place is given.made.taken.place]
            assert moved <= {first[i] for i in places} and moved


@pytest.mark.parametrize("make", ["_redraw", "_redraw_before"])
def test_what_is_not_redrawn_is_kept_and_no_block_of_it_is_run(further_lessons, make: str) -> None:
    tokens, kept, skipped = further_lessons.tokens, 0, 0
    for number in range(40):
        example = further_lessons.examples[number % len(further_lessons.examples)]
        sequence = getattr(further_lessons, make)(example, random.Random(number))[0]
        source, after = (tokens.codes_to_ids(curriculum.flat(codes)) for codes in (example.small, example.changed))
        changed = {place for place in Place if example.scene.at(place) != example.result.at(place)}
        blocks = set()
        for index, cell in enumerate(sequence.cells):
            if not sequence.noisy[index] or cell < 0:
                continue
            at = cell // packed.SIDES * 8 + cell % packed.SIDES
            blocks.add(sequence.positions[index] // packed.BLOCK)
            target = sequence.targets[index]
            if target >= 0:
                assert sequence.ids[index] == tokens.mask and target in (source[at], after[at])
            else:
                assert sequence.ids[index] in (source[at], after[at])
                kept += sequence.ids[index] == source[at] and curriculum.places(8)[at] not in changed
        if make == "_redraw":
            assert {curriculum.places(8)[i] for i in range(64)} >= changed
        first = min(at for at, cell in zip(sequence.positions, sequence.cells, strict=True) if cell >= 0)
        skipped += len(blocks) < (first + 63) // packed.BLOCK - first // packed.BLOCK + 1
    assert kept > 200 and skipped > 5


def test_redrawing_learns_the_request_of_the_task(further_lessons, scripts: Backbone, monkeypatch) -> None:
    """The task, asked for the same part, gives its network what is learned."""
    example, rng = further_lessons.examples[0], random.Random(3)
    tokens = further_lessons.tokens
    sequence = further_lessons._redraw(example, rng)[0]
    ids = [clean(sequence)[at] for at in range(len(clean(sequence)))]
    grid = curriculum.grid_of(example.small)
    wanted = prompts.edit(tokens, grid, example.instruction, (8, 8)).conditional
    assert ids[: len(wanted)] == wanted[: len(ids)]
    open = {
        sequence.cells[i] // packed.SIDES * 8 + sequence.cells[i] % packed.SIDES
        for i, target in enumerate(sequence.targets)
        if target >= 0 and sequence.cells[i] >= 0
    }
    masked = np.array([index in open for index in range(64)]).reshape(8, 8)
    mixed = [
        a if index in open else b
        for index, (a, b) in enumerate(zip(*map(curriculum.flat, (example.changed, example.small)), strict=True))
    ]
    scripted(scripts, wanted, tokens.codes_to_ids(mixed), monkeypatch)
    drawn = tasks.redraw(
        scripts, grid, masked, example.instruction, prompts.Seeing.PICTURE, rescale=0.0, sampling=Sampling(steps=4)
    )
    assert curriculum.flat(drawn.grid.codes.tolist()) == mixed


def test_nothing_that_is_learned_further_is_held_out() -> None:
    for shapes, scene in islice(further.unplaced("unplaced"), 300):
        assert not held_out(scene) and not any(held_out_pair(shape.kind, shape.colour) for shape in shapes)
    for both, made in islice(further.loans("loans"), 200):
        assert not any(map(held_out, (*both, made.result)))
    lengths = set()
    for told in islice(further.tales("tales"), 300):
        assert not any(map(held_out, told.scenes))
        lengths.add(len(told.scenes))
    assert lengths == {1, 2, 3}


def test_every_task_has_its_turn_and_its_size(further_lessons) -> None:
    tasks = set(further_lessons.makers)
    for name in ("backbone-sixth", "backbone-seventh", "backbone-eighth"):
        assert set(backbone.FURTHER[name].turns[0]) == tasks - {"story words", "ask own"}  # which came later
    assert set(backbone.FURTHER["backbone-ninth"].turns[0]) == tasks - {"ask own"}
    assert tasks == set(further_lessons.sizes)
    for name in ("backbone-tenth", "backbone-eleventh"):
        assert set(backbone.FURTHER[name].turns[0]) < tasks


def test_a_short_run_gets_better_at_each_task(further_lessons) -> None:
    """On one batch of each, from nothing: the loss of the tokens, and of what they are told, falls."""
    for task in further.SIZES:
        torch.manual_seed(0)
        learner = backbone.Learner()
        learner.train()
        further_lessons.sizes |= {task: 1}
        batch = further_lessons.batch(task, random.Random(3))
        optimiser, losses = torch.optim.AdamW(learner.parameters(), lr=3e-3), []
        for _ in range(4):
            told = learner.losses(task, batch)
            optimiser.zero_grad()
            told["loss"].backward()
            optimiser.step()
            losses.append((float(told[task].detach()), float(told["loss"].detach())))
        assert losses[-1][0] < losses[0][0] and losses[-1][1] < losses[0][1], task
    further_lessons.sizes |= further.SIZES


def test_further_training_needs_the_checkpoint_alone_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    work.mkdir()
    shutil.copytree(BUILT_IN, out, ignore=shutil.ignore_patterns("mlx-*"))
    for name, count in {"EXAMPLES": 12, "UNPLACED": 3, "LOANS": 3, "TALES": 6, "OWN": 3}.items():
        monkeypatch.setattr(data, name, count)
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0)
    short = backbone.Stage(loop.Schedule(steps=1, rate=1e-3), {0: ("free",)})
    turns = {0: ("free", "redraw before")}
    both = ("backbone-heads", "backbone-sixth")
    stages = {
        "backbone-heads": short,
        "backbone-sixth": backbone.Stage(loop.Schedule(steps=2, rate=1e-3), turns),
        "backbone-seventh": backbone.Stage(loop.Schedule(steps=1, rate=0.0), {0: ("free",)}, mean_of=both),
    }
    monkeypatch.setattr(backbone, "FURTHER", stages)
    monkeypatch.setattr(backbone, "BLENDED", ("backbone-sixth", *["backbone-seventh"] * 2))
    before = (out / "model.safetensors").read_bytes()
    stopped = KeyboardInterrupt("after a step")
    whole, calls = further.FurtherCurriculum.batch, []

    def stopping(self, task, rng):
        calls.append(task)
        if len(calls) == 3:
            raise stopped
        return whole(self, task, rng)

    monkeypatch.setattr(further.FurtherCurriculum, "batch", stopping)
    with pytest.raises(KeyboardInterrupt):
        trainer.Training(work, out).further()
    assert (out / "model.safetensors").read_bytes() == before
    trainer.Training(work, out).further()
    assert calls == ["free", "free", *["redraw before"] * 2, "free"]  # the third again, and no other
    assert (out / "model.safetensors").read_bytes() != before
    assert Tokens(Checkpoint(out)).doubt("Put the ring of the first picture into the second.") is None
    assert Checkpoint(out).backbone_tensors().keys() == Checkpoint(BUILT_IN).backbone_tensors().keys()
    two = [torch.load(work / f"further/{name}.pt", weights_only=True)["averaged"] for name in both]
    for name, value in load_file(out / "model.safetensors").items():
        heads, sixth = (each[f"network.{name}"] for each in two)
        assert torch.equal(value, ((sixth + (heads + sixth) / 2 + (heads + sixth) / 2) / 3).bfloat16())

    later = [work / f"further/{name}.pt" for name in stages if name != "backbone-heads"]
    for path in later:
        path.rename(path.with_suffix(".kept"))
    trainer.Training(work, tmp_path / "early").snapshot()
    early = load_file(tmp_path / "early/model.safetensors")
    assert all(torch.equal(value, two[0][f"network.{name}"].bfloat16()) for name, value in early.items())
    for path in later:
        path.with_suffix(".kept").rename(path)

    shot = tmp_path / "shot"
    trainer.Training(work, shot).snapshot()
    assert (shot / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert tasks.text_to_vq(
        Backbone(Checkpoint(shot)), "A red circle", sampling=Sampling(steps=2)
    ).grid.codes.shape == (8, 8)
    with pytest.raises(SystemExit, match="another folder"):
        trainer.Training(work, BUILT_IN).snapshot()


def test_questions_about_its_own_pictures_are_about_what_the_decoder_drew(
    further_lessons, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = tokenizer.Tokenizer().load_published(BUILT_IN / "image_tokenizer/image_tokenizer.safetensors")
    monkeypatch.setattr(data, "EXAMPLES", 4)
    examples = data.examples(tmp_path, encoder, print)
    examples[1] = replace(examples[1], scene=examples[0].scene)  # not what will be drawn
    own = data.own(tmp_path, Studio(), examples, print)
    assert [each.small for each in own] == [each.small for each in examples if each is not examples[1]]
    for each in own:
        (drawn,) = (example for example in examples if example.small == each.small)
        assert replace(each, large=drawn.large) == drawn
        before, after = np.array(drawn.large), np.array(each.large)
        assert after.shape == (16, 16) and 0 < (before != after).mean() < 1  # another picture of the same scene
    assert data.own(tmp_path, None, examples, print) == own  # kept, and drawn once

    tokens = further_lessons.tokens
    (asked,) = further.FurtherCurriculum(tokens, examples, further_lessons.material, own[:1]).makers["ask own"](
        random.Random(0)
    )
    first, codes = len(tokens.header(16, 16)), tokens.codes_to_ids(sum(own[0].large, []))
    assert [clean(asked)[first + index] for index in range(200)] == codes[:200]


def test_what_happens_in_a_story_is_copied_from_its_prompt(further_lessons) -> None:
    """Each word of it that is told where to look is told a place with the same word, after what was told before."""
    lessons, tokens, words = further_lessons, further_lessons.tokens, 0
    word = lambda ids, index: tokens.decode([ids[index]]).strip().lower()
    for told in islice(further.tales("copied"), 200):
        asked, before = tokens.encode(told.prompt), 0
        for number, text in enumerate(told.texts[1:], 1):
            said, copied = tokens.encode(text), lessons._copied(told.prompt, text, told.texts[1:number])
            same = [word(said, index) == word(asked, at) for index, at in copied.items()]
            assert sum(same) >= len(same) - 1 and len(copied) >= 2  # "in the top left" may be "at the top left"
            verb = max(copied.values())
            assert verb > before
            before, words = verb, words + len(copied)
    assert words > 500
