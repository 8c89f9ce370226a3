"""What fits into Macs of some sizes, by the functions that choose it there. Computed, not measured on a Mac.

``python -m benchmarks.fitting`` in ``tests/`` prints the table of ``docs/performance.md``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from counting import hollow_checkpoint
from macs import MEMORY, as_on_metal, recommended
from published import BACKBONE
from rehearsal.pieces import DECODER

from llada2_mlx.backbone import precision
from llada2_mlx.backbone.working import fit, work_bytes
from llada2_mlx.checkpoint.layout import Checkpoint, Part
from llada2_mlx.imaging.engine import Plan, plan
from llada2_mlx.imaging.flow import DecodeOptions
from llada2_mlx.imaging.vae import VAE
from llada2_mlx.vq import VQGrid

MPS = torch.device("mps")
SIDE = 32  # codes of a picture of 1024 x 1024
PROMPT = 160  # tokens before them
HEADER = (
    "| Mac | Metal recommends | language model (`auto`) | its work, any length | its work at 1024 x 1024 | decoder (`auto`) | VAE | "
    "4 and 8 bits, one part at a time | 4 and 8 bits, both kept |"
)


def decoding(checkpoint: Checkpoint, memory: int, engine: str = "auto") -> Plan:
    """How the published decoder runs for 1024 x 1024, where Metal recommends so many bytes."""
    grids = [VQGrid(np.zeros((SIDE, SIDE), dtype="int32"), 16384)]
    with as_on_metal(memory):
        return plan(checkpoint, Part.DECODER_TURBO, engine, grids, DecodeOptions(), MPS)


def rows(checkpoint: Checkpoint) -> Iterator[str]:
    """A line for each of ``MEMORY``.

    Args:
        checkpoint: one with the published decoder and VAE, of which headers are read.
    """
    gb = lambda size: f"{size / 1e9:.1f}"
    latents = torch.empty(1, 16, 4 * SIDE, 4 * SIDE, device="meta")
    vae = checkpoint.weight_bytes(Part.VAE) + VAE.working_bytes(checkpoint, latents, MPS)
    drawing = lambda piece: work_bytes(BACKBONE, mx.bfloat16, piece, 2 * (PROMPT + SIDE * SIDE))
    for gib in MEMORY:
        there = recommended(gib)
        with as_on_metal(there):
            chosen, _ = precision.choose(BACKBONE, "bf16", there)
            size, small = (precision.precision_bytes(BACKBONE, name) for name in (chosen, "4bit"))
            work, least = (fit(BACKBONE, mx.bfloat16, left) for left in (there - size, 0))
            drawn, alone = (each.cache + drawing(each.piece) for each in (work, least))
        decoder, eight = (decoding(checkpoint, there, engine) for engine in ("auto", "mlx-8bit"))
        one = max(small + alone, eight.size + eight.working, vae)
        both = small + eight.size + max(alone, eight.working)
        fits = lambda size, there=there: f"{gb(size)}, {'fits' if size <= there else 'too much'}"
        yield (
            f"| {gib} GB | {gb(there)} | {chosen}, {gb(size)} | {gb(work.size)} in pieces of {work.piece} | {gb(drawn)} "
            f"| {decoder.engine}, {gb(decoder.size)} + {gb(decoder.working)} | {gb(vae)} | {fits(one)} | {fits(both)} |"
        )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = hollow_checkpoint(Path(folder), DECODER["n_layers"])
        print(HEADER, "|---" * (HEADER.count("|") - 1) + "|", *rows(checkpoint), sep="\n")


if __name__ == "__main__":
    main()
