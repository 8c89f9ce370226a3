"""The trainer: what it learns from is what generation will see, and what it exports is what the library runs."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import islice
from pathlib import Path

import mlx.core as mx
import pytest
import torch

from llada2_mlx import prompts
from llada2_mlx.backbone.handle import Backbone
from llada2_mlx.backbone.session import Session
from llada2_mlx.checkpoint.layout import Checkpoint, Part
from llada2_mlx.imaging import load_part
from llada2_mlx.progress import Progress
from llada2_mlx.shapes.grammar import Change, Question, Topic, edit
from llada2_mlx.shapes.training import backbone, curriculum, data, decoder, export, further, loop, packed, tokenizer
from llada2_mlx.shapes.training.network import Network
from llada2_mlx.shapes.training.pixels import drawn
from llada2_mlx.shapes.world import (
    Background,
    Colour,
    Kind,
    Pattern,
    Place,
    Scene,
    Shape,
    Size,
    Tone,
    draw,
    held_out_shape,
    scenes,
)


def block_causal(positions: torch.Tensor) -> torch.Tensor:
    block = positions // packed.BLOCK
    return (block[None] <= block[:, None])[None]


@torch.no_grad()
def test_the_trainer_and_mlx_compute_the_same(folder: Path, network: Network) -> None:
    ids = torch.randint(backbone.CONFIG.vocab_size, (2, 70), generator=torch.Generator().manual_seed(1))
    mask = block_causal(torch.arange(70)).expand(2, -1, -1)
    hidden = network(ids, torch.arange(70).expand(2, -1), mask)
    opened = Backbone(Checkpoint(folder), "float32")

    def forward(model):
        found = model(mx.array(ids.numpy()), mask=mx.array(mask[:, None].numpy()))
        yield Progress("forward", 1, 1)
        return torch.tensor(found.tolist()), torch.tensor(model.logits(found).tolist())

    found, logits = opened.run(forward)
    assert torch.allclose(found, hidden, atol=2e-4)
    assert torch.allclose(logits, network.lm_head(hidden), atol=2e-4)


@pytest.mark.parametrize("task", [*curriculum.BATCHES, *further.SIZES])
@torch.no_grad()
def test_a_noisy_copy_sees_what_generation_will_see(further_lessons, network: Network, task: str) -> None:
    """Each masked block of a batch gives what it gives alone, after its clean tokens in one plain sequence."""
    batch = further_lessons.batch(task, random.Random(1))
    hidden = network(batch["ids"], batch["positions"], batch["mask"])
    mask_id, checked = further_lessons.tokens.mask, 0
    for row in range(min(3, len(batch["ids"]))):
        ids, positions, targets = (batch[name][row] for name in ("ids", "positions", "targets"))
        starts = [
            i
            for i in range(len(ids))
            if positions[i] % packed.BLOCK == 0 and (targets[i : i + packed.BLOCK] >= 0).any()
        ]
        for start in starts:
            own = slice(start, start + packed.BLOCK)
            seen = batch["mask"][row, start].nonzero().flatten()
            order = positions[seen].argsort()
            seen = seen[order]
            begin, before = int(positions[seen[0]]), int(positions[start])
            assert positions[seen].tolist() == list(range(begin, before + packed.BLOCK))  # each position once
            plain, before = ids[seen], before - begin
            assert (plain[before:] == ids[own]).all() and mask_id not in plain[:before]
            alone = network(plain[None], positions[seen][None], block_causal(positions[seen]))[0]
            assert torch.allclose(alone[before:], hidden[row, own], atol=1e-4)
            checked += 1
    assert checked >= 4


def test_what_is_learned_is_the_response_and_only_where_it_is_masked(lessons) -> None:
    for task in curriculum.BATCHES:
        batch = lessons.batch(task, random.Random(2))
        learned = batch["targets"] >= 0
        assert learned.any() and (batch["ids"][learned] == lessons.tokens.mask).all()
        text = batch["targets"][learned] < backbone.TEXT_IDS
        assert text.all() if task.startswith("ask") else not text.any()


def test_an_edit_is_told_to_look_at_the_same_place_of_its_source(lessons) -> None:
    example = replace(lessons.examples[0], changed=lessons.examples[0].small)  # nothing changes
    for sequence in lessons._edit(example, random.Random(5))[:2]:
        told = [index for index, source in enumerate(sequence.sources) if source >= 0 and sequence.targets[index] >= 0]
        assert len(told) > 10
        for index in told:
            assert sequence.ids[sequence.sources[index]] == sequence.targets[index]
            assert sequence.cells[sequence.sources[index]] == sequence.cells[index]


def test_a_masked_code_is_told_what_it_will_be_part_of(lessons) -> None:
    example = lessons.examples[0]
    (sequence,) = lessons._draw(example, random.Random(1))
    told = [index for index, name in enumerate(sequence.names) if name >= 0 and sequence.targets[index] >= 0]
    assert len(told) > 10
    for index in told:
        shape = example.scene.at(place(sequence.cells[index], 8))
        if sequence.names[index]:
            assert sequence.names[index] == curriculum.shape_class(shape)
        else:  # beside a shape, or there is none
            row, column = divmod(sequence.cells[index], packed.SIDES)
            assert shape is None or {row % 4, column % 4} & {0, 3}


def test_a_code_that_is_drawn_is_told_to_look_at_the_words_for_its_place(lessons) -> None:
    tokens, checked = lessons.tokens, 0
    for example, seed in zip(lessons.examples, range(5), strict=False):
        (sequence,) = lessons._draw(example, random.Random(seed))
        words = once(sequence, lambda part: part)
        assert len(words) in (0, len(example.scene.shapes))
        for index in words:
            shape = example.scene.at(list(Place)[sequence.parts[index].bit_length() - 1])
            assert tokens.decode(sequence.ids[: index + 1]).endswith(shape.place.value)
            assert sequence.names[index] == curriculum.shape_class(shape)
        for index, cell in enumerate(sequence.cells):
            shape = example.scene.at(place(cell, 8)) if cell >= 0 else None
            assert sequence.asks[index] == (packed.PARTS[shape.place] if shape else 0)
            checked += bool(shape)
    assert checked > 100


@pytest.mark.parametrize(("task", "side"), [("_ask", 16), ("_ask_small", 8)])
def test_an_answer_is_told_to_look_at_what_it_is_about(lessons, task: str, side: int) -> None:
    example = lessons.examples[0]
    (sequence,) = getattr(lessons, task)(example, random.Random(3))
    for index, cell in enumerate(sequence.cells):
        if sequence.parts[index]:
            shape = example.scene.at(place(cell, side))
            assert sequence.parts[index] == packed.PARTS[shape.place]
            assert sequence.names[index] == curriculum.shape_class(shape)
    asking = [index for index, ask in enumerate(sequence.asks) if ask]
    shapes = sum(packed.PARTS[shape.place] for shape in example.scene.shapes)
    assert asking and all(sequence.asks[index] & ~shapes == 0 and sequence.cells[index] < 0 for index in asking)
    for index in asking:  # the words of a description are about one shape each
        target = lessons.tokens.decode([sequence.targets[index]]).strip() if sequence.targets[index] >= 0 else ""
        if sequence.groups[index] == 1 and target in [kind.value for kind in Kind]:
            about = example.scene.at(list(Place)[sequence.asks[index].bit_length() - 1])
            assert target == about.kind.value


@pytest.mark.parametrize("change", Change)
def test_an_edit_is_told_to_look_at_its_instruction_where_something_changes(lessons, change: Change) -> None:
    rng = random.Random(0)
    made = None
    while made is None:
        scene = next(scenes(rng.random()))
        made = edit(scene, change, rng)
    codes = lessons.examples[0].small
    example = curriculum.Example(scene, codes, codes, made.instruction, made.result, codes)
    sequence = lessons._edit(example, rng)[0]
    changed = {at for at in Place if scene.at(at) != made.result.at(at)} or set(Place)
    assert len(changed) == {"move": 2, "background": 4}.get(change.value, 1)
    for index, cell in enumerate(sequence.cells):
        if sequence.sources[index] >= 0:  # a noisy code of the result
            assert (sequence.asks[index] == packed.INSTRUCTION) == (place(cell, 8) in changed)
    (last,) = once(sequence, lambda part: part == packed.INSTRUCTION)
    assert lessons.tokens.decode(sequence.ids[: last + 1]).endswith(made.instruction)
    before = sum(packed.PARTS[at] for at in changed if change is not Change.BACKGROUND and scene.at(at))
    assert sequence.asks[last] == before


def once(sequence: packed.Packed, told) -> list[int]:
    """The first token at each position whose part is told of; a noisy copy may hold the prompt's end again."""
    indices = [index for index, part in enumerate(sequence.parts) if told(part)]
    return [
        index
        for number, index in enumerate(indices)
        if sequence.positions[index] not in [sequence.positions[earlier] for earlier in indices[:number]]
    ]


def place(cell: int, side: int) -> Place:
    row, column = divmod(cell, packed.SIDES)
    return list(Place)[2 * row // side * 2 + 2 * column // side]


def test_branches_begin_where_generation_lets_them_begin(lessons) -> None:
    """A branch without its text ends where the conditional one does, so that their blocks are the same."""
    tokens, rng = lessons.tokens, random.Random(0)
    example, without = lessons.examples[0], 0
    for _ in range(200):
        branches = lessons._edit(example, rng)
        assert [sequence.branch for sequence in branches] in ([0, 1], [0, 1, 2])
        prompt = prompts.edit(tokens, curriculum.grid_of(example.small), example.instruction)
        first = Session.begin(prompt.branches, 32, None).begins
        for sequence, branch, begin in zip(branches, prompt.branches, first, strict=False):
            assert sequence.begin == sequence.positions[0] == begin
            clean = sequence.ids[: sequence.noisy.index(1)][: len(branch)]
            assert clean == branch[: len(clean)]
        # what guidance makes of both is learned position by position
        learned = [
            [(p, t) for p, t in zip(sequence.positions, sequence.targets, strict=True) if t >= 0]
            for sequence in branches
        ]
        assert all(both == learned[0] for both in learned)
        without += len(branches) == 3
    assert 5 < without < 45
    unconditional = prompts.text_to_image(tokens, "any", 8, 8).branches[1]
    drawn = [lessons._draw(example, rng)[0] for _ in range(200)]
    begun = [sequence for sequence in drawn if sequence.begin]
    assert 5 < len(begun) < 45
    assert all(sequence.ids[: len(unconditional)] == unconditional for sequence in begun)


@pytest.mark.parametrize("change", Change)
def test_what_an_edit_only_copies_may_be_anything(lessons, change: Change) -> None:
    rng = random.Random(0)
    made = ((scene, edit(scene, change, rng)) for scene in scenes("any", test=False) if len(scene.shapes) > 1)
    scene, made = next((scene, made) for scene, made in made if made)
    codes = lambda: [[rng.randrange(tokenizer.CODES) for _ in range(8)] for _ in range(8)]
    example = curriculum.Example(scene, codes(), codes(), made.instruction, made.result, codes())
    scrambled = curriculum.scrambled(example, rng)
    flat = lambda grid: [code for row in grid for code in row]
    before, after, old, new = map(flat, (scrambled.small, scrambled.changed, example.small, example.changed))
    # a code that may be anything is the same before and after, and all others are as they were
    assert [before[i] == old[i] or i in scrambled.any_before for i in range(64)] == [True] * 64
    assert [after[i] == new[i] or i in scrambled.any_after for i in range(64)] == [True] * 64
    moves = curriculum.moves(example.scene, example.result, 8)
    assert [before[moves.get(i, i)] for i in scrambled.any_after] == [after[i] for i in scrambled.any_after]
    assert bool(scrambled.any_after) == (change is not Change.BACKGROUND)
    at = [place(index // 8 * packed.SIDES + index % 8, 8) for index in range(64)]
    stays = {shape.place for shape in scene.shapes} & {
        shape.place for shape in made.result.shapes if shape in scene.shapes
    }
    assert {at[index] for index in scrambled.any_after} - stays <= {at[index] for index in moves}
    assert bool(moves) == (change is Change.MOVE)


def test_a_code_that_moves_is_told_where_it_was(lessons) -> None:
    shape = Shape(Kind.CIRCLE, Colour.RED, Place.TOP_LEFT, Size.LARGE)
    scene = Scene((shape,), Background(Pattern.PLAIN, Tone.WHITE))
    result = Scene((replace(shape, place=Place.BOTTOM_RIGHT),), scene.background)
    codes = [[8 * row + column for column in range(8)] for row in range(8)]
    after = [[512 + code for code in row] for row in codes]
    example = curriculum.Example(scene, codes, codes, "Move the circle to the bottom right.", result, after)
    told = 0
    for sequence in lessons._edit(example, random.Random(0))[:2]:
        for token, moved in enumerate(sequence.moved):
            if moved >= 0:
                row, column = divmod(sequence.cells[token], packed.SIDES)
                assert sequence.ids[moved] == backbone.TEXT_IDS + codes[row - 4][column - 4] and sequence.noisy[token]
                told += 1
    assert told == 2 * 16


def test_no_question_teaches_that_a_held_out_shape_is_never_there() -> None:
    circle = Shape(Kind.CIRCLE, Colour.BLUE, Place.TOP_LEFT, Size.LARGE)
    scene = Scene((circle,), Background(Pattern.PLAIN, Tone.WHITE))
    fair = lambda text, answer="no": curriculum.fair(Question(Topic.EXISTENCE, text, answer, ()), scene)
    assert held_out_shape(Kind.CIRCLE, Colour.RED, Place.TOP_LEFT)
    assert not fair("Is there a red circle?")
    assert not held_out_shape(Kind.CIRCLE, Colour.GREEN, Place.TOP_LEFT)
    assert fair("Is there a green circle?") and fair("Is there a circle?")
    assert fair("Is there a red square?")  # nothing is like it
    assert fair("Where is the red circle?", "in the top right")  # it is there


def test_the_image_tokenizer_is_the_librarys(folder: Path) -> None:
    torch.manual_seed(0)
    trained, opened = export.rounded(tokenizer.Tokenizer()).eval(), load_part(Checkpoint(folder), Part.IMAGE_TOKENIZER)
    opened.vision.float(), opened.quantiser.float()
    for scene in islice(scenes("codes"), 3):
        pixels = drawn([scene])
        with torch.no_grad():
            expected = trained.encode(pixels)[0]
        found = opened.encode_prepared([draw(scene)])[0].codes
        assert (torch.tensor(found) == expected).float().mean() > 0.99  # two roundings of one sum


@torch.no_grad()
def test_telling_the_decoder_where_to_look_changes_nothing_in_what_it_computes() -> None:
    from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor

    torch.manual_seed(0)
    module = decoder.FlowDecoder()
    latents, times = torch.randn(2, 16, 32, 32), torch.tensor([0.2, 0.7])
    features = module.features(torch.randint(tokenizer.CODES, (2, 8, 8)))
    told = module.velocity(latents, times, features)
    for layer in module.transformer.layers:
        layer.attention.set_processor(ZSingleStreamAttnProcessor())
    assert torch.allclose(module.velocity(latents, times, features), told, atol=1e-5)


def test_training_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0)
    schedule = loop.Schedule(steps=8, rate=0.1, warmup=2, average=0.5)

    def run(name: str, stop: int | None) -> torch.Tensor:
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 2)

        def losses(step: int, rng: random.Random) -> dict[str, torch.Tensor]:
            if step == stop:
                raise KeyboardInterrupt
            return {"loss": ((module(torch.randn(4, 3)) - rng.random()) ** 2).mean()}

        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return loop.train("stage", module, losses, schedule, folder, say=lambda _: None).weight

    whole = run("whole", None)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", 5)
    assert torch.equal(run("stopped", None), whole)
    table = (tmp_path / "whole/stage.tsv").read_text().splitlines()
    assert table[0].split("\t") == ["step", "minutes", "loss"] and len(table) == 9


def test_no_example_is_held_out() -> None:
    from llada2_mlx.shapes.world import held_out

    for scene, made in islice(data._pairs(), 300):
        assert not held_out(scene) and not held_out(made.result)
