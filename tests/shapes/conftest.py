"""What the tests of the trainer share: untrained parts, and lessons whose codes are random."""

from __future__ import annotations

import random
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch

from llada2_mlx.checkpoint.layout import Checkpoint
from llada2_mlx.shapes.grammar import Change, edit
from llada2_mlx.shapes.training import backbone, curriculum, export, further, tokenizer
from llada2_mlx.shapes.training.network import Network
from llada2_mlx.shapes.training.text import add_words, further_sentences, sentences
from llada2_mlx.shapes.world import scenes
from llada2_mlx.tokens import Tokens


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the trainer's text tokenizer and an untrained backbone and image tokenizer."""
    folder = tmp_path_factory.mktemp("untrained")
    export.write_text(folder, backbone.CONFIG, {}, sentences(200))
    torch.manual_seed(0)
    export.write_backbone(folder, Network(backbone.CONFIG).state_dict())
    torch.manual_seed(0)
    untrained = tokenizer.Tokenizer()
    export.write_image_tokenizer(folder, untrained.vision, untrained.quantiser, tokenizer.CONFIGS)
    return folder


@pytest.fixture(scope="session")
def network() -> Network:
    torch.manual_seed(0)
    return export.rounded(Network(backbone.CONFIG)).eval()


@pytest.fixture(scope="session")
def lessons(folder: Path) -> curriculum.Curriculum:
    rng = random.Random(0)
    codes = lambda side: [[rng.randrange(tokenizer.CODES) for _ in range(side)] for _ in range(side)]
    examples = []
    for scene in islice(scenes("test", test=False), 20):
        made = edit(scene, Change.RECOLOUR, rng)
        examples.append(curriculum.Example(scene, codes(8), codes(16), made.instruction, made.result, codes(8)))
    return curriculum.Curriculum(Tokens(Checkpoint(folder)), examples)


@pytest.fixture(scope="session")
def further_lessons(folder: Path, tmp_path_factory: pytest.TempPathFactory, lessons) -> further.FurtherCurriculum:
    """With the words of the further tasks, and with codes that are random."""
    rng = random.Random(1)
    codes = lambda: [[rng.randrange(tokenizer.CODES) for _ in range(8)] for _ in range(8)]
    own = tmp_path_factory.mktemp("words")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, own)
    add_words(own / "tokenizer.json", backbone.TEXT_IDS, further_sentences(300))
    material = further.Material(
        [further.Unplaced(shapes, scene, codes()) for shapes, scene in islice(further.unplaced("test"), 10)],
        [further.Loaned(both, made, (codes(), codes(), codes())) for both, made in islice(further.loans("test"), 10)],
        [further.Told(tale, tuple(codes() for _ in tale.scenes)) for tale in islice(further.tales("test"), 10)],
    )
    return further.FurtherCurriculum(Tokens(Checkpoint(own)), lessons.examples, material, lessons.examples)
