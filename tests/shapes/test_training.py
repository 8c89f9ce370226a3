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
from llada2_mlx.backbone import Backbone
from llada2_mlx.checkpoint import Checkpoint, Part
from llada2_mlx.imaging import load_part
from llada2_mlx.progress import Progress
from llada2_mlx.shapes.grammar import Change, edit
from llada2_mlx.shapes.training import backbone, data, decoder, export, loop, tokenizer
from llada2_mlx.shapes.training.network import Network
from llada2_mlx.shapes.world import Colour, Kind, Place, draw, draw_array, scenes
from llada2_mlx.tokens import Tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the trainer's text tokenizer and an untrained backbone and image tokenizer."""
    folder = tmp_path_factory.mktemp("untrained")
    export.write_text(folder)
    torch.manual_seed(0)
    export.write_backbone(folder, export.rounded(Network(backbone.CONFIG)))
    torch.manual_seed(0)
    export.write_image_tokenizer(folder, export.rounded(tokenizer.Tokenizer()))
    return folder


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    return export.rounded(Network(backbone.CONFIG)).eval()


@pytest.fixture(scope="module")
def curriculum(folder: Path) -> backbone.Curriculum:
    rng = random.Random(0)
    codes = lambda side: [[rng.randrange(tokenizer.CODES) for _ in range(side)] for _ in range(side)]
    examples = []
    for scene in islice(scenes("test", test=False), 20):
        made = edit(scene, Change.RECOLOUR, rng)
        examples.append(
            backbone.Example(scene, codes(8), codes(16), made.change, made.instruction, made.result, codes(8))
        )
    return backbone.Curriculum(Tokens(Checkpoint(folder)), examples)


def block_causal(length: int) -> torch.Tensor:
    block = torch.arange(length) // backbone.BLOCK
    return (block[None] <= block[:, None])[None]


@torch.no_grad()
def test_the_trainer_and_mlx_compute_the_same(folder: Path, network: Network) -> None:
    ids = torch.randint(backbone.CONFIG.vocab_size, (2, 70), generator=torch.Generator().manual_seed(1))
    mask = block_causal(70).expand(2, -1, -1)
    hidden = network(ids, torch.arange(70).expand(2, -1), mask)
    opened = Backbone(Checkpoint(folder), "float32")

    def forward(model):
        found = model(mx.array(ids.numpy()), mask=mx.array(mask[:, None].numpy()))
        yield Progress("forward", 1, 1)
        return torch.tensor(found.tolist()), torch.tensor(model.logits(found).tolist())

    found, logits = opened.run(forward)
    assert torch.allclose(found, hidden, atol=2e-4)
    assert torch.allclose(logits, network.lm_head(hidden), atol=2e-4)


@pytest.mark.parametrize("task", backbone.BATCHES)
@torch.no_grad()
def test_a_noisy_copy_sees_what_generation_will_see(curriculum, network: Network, task: str) -> None:
    """Each masked block of a batch gives what it gives alone, after its clean tokens in one plain sequence."""
    batch = curriculum.batch(task, random.Random(1))
    hidden = network(batch["ids"], batch["positions"], batch["mask"])
    mask_id, checked = curriculum.tokens.mask, 0
    for row in range(2):
        ids, positions, targets = (batch[name][row] for name in ("ids", "positions", "targets"))
        starts = [i for i in range(0, len(ids), backbone.BLOCK) if (targets[i : i + backbone.BLOCK] >= 0).any()]
        for start in starts:
            own = slice(start, start + backbone.BLOCK)
            before = int(positions[start])
            seen = batch["mask"][row, start].nonzero().flatten()
            order = positions[seen].argsort()
            seen = seen[order]
            assert positions[seen].tolist() == list(range(before + backbone.BLOCK))  # each position once
            plain = ids[seen]
            assert (plain[before:] == ids[own]).all() and mask_id not in plain[:before]
            alone = network(plain[None], positions[seen][None], block_causal(len(plain)))[0]
            assert torch.allclose(alone[before:], hidden[row, own], atol=1e-4)
            checked += 1
    assert checked >= 4


def test_what_is_learned_is_the_response_and_only_where_it_is_masked(curriculum) -> None:
    for task in backbone.BATCHES:
        batch = curriculum.batch(task, random.Random(2))
        learned = batch["targets"] >= 0
        assert learned.any() and (batch["ids"][learned] == curriculum.tokens.mask).all()
        text = batch["targets"][learned] < backbone.TEXT_IDS
        assert text.all() if task.startswith("ask") else not text.any()


def test_an_edit_is_told_to_look_at_the_same_place_of_its_source(curriculum) -> None:
    example = replace(curriculum.examples[0], changed=curriculum.examples[0].small)  # nothing changes
    sequence = None
    while sequence is None or max(sequence.sources) < 0:
        sequence = curriculum._edit(example, random.Random(5))
    for index, source in enumerate(sequence.sources):
        if source >= 0 and sequence.targets[index] >= 0:
            assert sequence.ids[source] == sequence.targets[index]
            assert sequence.cells[source] == sequence.cells[index]


def test_a_masked_code_is_told_what_it_will_be_part_of(curriculum) -> None:
    example = curriculum.examples[0]
    sequence = curriculum._draw(example, random.Random(1))
    told = [index for index, name in enumerate(sequence.names) if name >= 0]
    assert told and all(sequence.targets[index] >= 0 for index in told)
    for index in told:
        row, column = divmod(sequence.cells[index], backbone.SIDES)
        colour, kind = divmod(sequence.names[index], 1 + len(Kind))
        shape = example.scene.at(list(Place)[row // 4 * 2 + column // 4])
        if colour:
            assert shape.colour is list(Colour)[colour - 1] and shape.kind is list(Kind)[kind - 1]
        else:
            assert kind == 0 and (shape is None or {row % 4, column % 4} & {0, 3})  # beside a shape, or there is none


def test_prompts_without_their_text_and_without_their_picture_are_learned_too(curriculum) -> None:
    tokens, rng = curriculum.tokens, random.Random(0)
    example = curriculum.examples[0]
    unconditional = prompts.text_to_image(tokens, "any", 8, 8).branches[1]
    drawn = [curriculum._draw(example, rng).ids[: len(unconditional)] == unconditional for _ in range(200)]
    assert 5 < sum(drawn) < 45
    without_picture = [tokens.image_end not in curriculum._edit(example, rng).ids for _ in range(200)]
    assert 1 <= sum(without_picture) < 30


def test_the_image_tokenizer_is_the_librarys(folder: Path) -> None:
    torch.manual_seed(0)
    trained, opened = export.rounded(tokenizer.Tokenizer()).eval(), load_part(Checkpoint(folder), Part.IMAGE_TOKENIZER)
    opened.vision.float(), opened.quantiser.float()
    for scene in islice(scenes("codes"), 3):
        pixels = loop.images_to_tensor([draw_array(scene)])
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
