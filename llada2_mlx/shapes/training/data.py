"""What the later stages learn from: pictures as codes and latents, made once."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch.nn import functional as F

from ...files import replacing
from ...imaging.flow import DecodeOptions
from ...imaging.pixels import to_images
from ...imaging.prepare import Purpose
from ..grammar import Change, Edit, edit
from ..measures import same_layout
from ..studio import Studio
from ..world import Scene, held_out, scenes
from .curriculum import Example, grid_of
from .further import Loaned, Material, Told, Unplaced, loans, tales, unplaced
from .pixels import drawn
from .tokenizer import SMALL, Tokenizer
from .vae import Autoencoder

EXAMPLES = 16000  # for the backbone
UNPLACED, LOANS, TALES = 3000, 5000, 6000  # for what it learns further
OWN, OWN_STEPS = 620, 4  # examples as the turbo decoder draws them, in half of its usual steps, and hardly worse
PICTURES = 5000  # for the decoder
BATCH = 50


def examples(folder: Path, tokenizer: Tokenizer, say: Callable[[str], None]) -> list[Example]:
    """The backbone's examples; their codes are kept in ``folder``."""
    told = list(islice(_pairs(), EXAMPLES))

    def encode(start: int) -> dict[str, torch.Tensor]:
        part = told[start : start + BATCH]
        before, after = drawn(scene for scene, _ in part), drawn(made.result for _, made in part)
        codes = {"small": halved(before), "large": before, "changed": halved(after)}
        return {name: tokenizer.encode(pixels).short() for name, pixels in codes.items()}

    made_codes = _made(folder / "examples.pt", EXAMPLES, encode, say)
    return [
        Example(scene, small, large, made.instruction, made.result, changed)
        for (scene, made), small, large, changed in zip(
            told, *(made_codes[name].tolist() for name in ("small", "large", "changed")), strict=True
        )
    ]


def material(folder: Path, tokenizer: Tokenizer, say: Callable[[str], None]) -> Material:
    """What the backbone learns further; its codes are kept in ``folder``."""
    alone = list(islice(unplaced("unplaced"), UNPLACED))
    lent, told = list(islice(loans("loans"), LOANS)), list(islice(tales("tales"), TALES))
    pictures = [
        *(scene for _, scene in alone),
        *(scene for both, made in lent for scene in (*both, made.result)),
        *(scene for each in told for scene in each.scenes),
    ]

    def encode(start: int) -> dict[str, torch.Tensor]:
        return {"codes": tokenizer.encode(halved(drawn(pictures[start : start + BATCH]))).short()}

    made_codes = iter(_made(folder / "material.pt", len(pictures), encode, say)["codes"].tolist())
    take = lambda count: tuple(islice(made_codes, count))
    return Material(
        [Unplaced(shapes, scene, *take(1)) for shapes, scene in alone],
        [Loaned(both, made, take(3)) for both, made in lent],
        [Told(each, take(len(each.scenes))) for each in told],
    )


def own(folder: Path, studio: Studio, examples: Sequence[Example], say: Callable[[str], None]) -> list[Example]:
    """The first examples with the codes of what the decoder makes of them as ``large``; kept in ``folder``.

    Those of which the detector reads another scene are left out.
    """
    chosen = examples[:OWN]

    def redraw(start: int) -> dict[str, torch.Tensor]:
        part = chosen[start : start + BATCH]
        latents = studio.turbo.sample([grid_of(each.small) for each in part], DecodeOptions(OWN_STEPS))
        pictures = to_images(studio.vae.decode(latents))
        grids = [studio.tokenizer.encode(picture, Purpose.UNDERSTAND) for picture in pictures]
        return {
            "codes": torch.tensor([grid.codes.tolist() for grid in grids]).short(),
            "right": torch.tensor([same_layout(*pair) for pair in zip(pictures, (each.scene for each in part))]),
        }

    made_codes = _made(folder / "own.pt", len(chosen), redraw, say)
    drawn = zip(chosen, made_codes["codes"].tolist(), made_codes["right"].tolist(), strict=True)
    return [replace(example, large=large) for example, large, right in drawn if right]


def latents(folder: Path, vae: Autoencoder, say: Callable[[str], None]) -> torch.Tensor:
    """Latents [pictures, 16, 32, 32] of the decoder's pictures, kept in ``folder``."""
    told = list(islice(scenes("decoder"), PICTURES))

    def encode(start: int) -> dict[str, torch.Tensor]:
        pictures = drawn(told[start : start + BATCH]).split(5)
        means = torch.cat([vae.model.encode(picture).latent_dist.mean for picture in pictures])
        return {"latents": ((means - vae.scaling["shift_factor"]) * vae.scaling["scaling_factor"]).half()}

    return _made(folder / "latents.pt", PICTURES, encode, say)["latents"]


def codes(folder: Path, tokenizer: Tokenizer, say: Callable[[str], None]) -> torch.Tensor:
    """Codes [pictures, 8, 8] of the same pictures, kept in ``folder``."""
    told = list(islice(scenes("decoder"), PICTURES))

    def encode(start: int) -> dict[str, torch.Tensor]:
        return {"codes": tokenizer.encode(halved(drawn(told[start : start + BATCH]))).short()}

    return _made(folder / "codes.pt", PICTURES, encode, say)["codes"]


def halved(pixels: torch.Tensor) -> torch.Tensor:
    """Pictures in the size in which the tokenizer sees what is drawn and edited."""
    return F.interpolate(pixels, (SMALL, SMALL), mode="bicubic", antialias=True).clamp(-1, 1)


def _pairs() -> Iterator[tuple[Scene, Edit]]:
    """Scenes with an edit each, none of them held out, before or after."""
    rng = random.Random("edits")
    for scene in scenes("backbone", test=False):
        made = None
        while made is None or held_out(made.result):
            made = edit(scene, rng.choice(list(Change)), rng)
        yield scene, made


def _made(
    path: Path, count: int, make: Callable[[int], dict[str, torch.Tensor]], say: Callable[[str], None]
) -> dict[str, torch.Tensor]:
    """The tensors of ``path``, made batch by batch if it is not there."""
    if not path.exists():
        parts = []
        with torch.inference_mode():
            for start in range(0, count, BATCH):
                parts.append(make(start))
                if start % (BATCH * 40) == 0:
                    say(f"{path.stem} {start}/{count}")
        with replacing(path) as partial:
            torch.save({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, partial)
    return torch.load(path, weights_only=True)
