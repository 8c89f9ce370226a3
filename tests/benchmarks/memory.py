"""What the decoder and the VAE have in memory at once, at the published sizes, and what is reserved for it.

``python -m benchmarks.memory`` in ``tests/``. Counted without values on the meta device, so that it runs anywhere in about a
minute. ``--vae PIXELS`` measures instead what a process grows by when it decodes a picture in float32 on the CPU.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from counting import CPU, META, Attentions, LiveBytes, hollow_checkpoint, on_meta
from rehearsal.pieces import VAE as VAE_CONFIG

from llada2_mlx.checkpoint.layout import Checkpoint, Part
from llada2_mlx.imaging.flow import DecodeOptions
from llada2_mlx.imaging.transformer_torch import Decoder
from llada2_mlx.imaging.vae import VAE
from llada2_mlx.vq import VQGrid

MPS = torch.device("mps")
PART = Part.DECODER_TURBO
GB = 1e9


def count(checkpoint: Checkpoint) -> None:
    """Print a line for each size; scores are written out by MPS, and here that depends on the installed PyTorch's version."""
    with on_meta():
        decoder, vae = Decoder(checkpoint, PART, META), VAE(checkpoint, META)
    print(f"GB at once, counted and reserved on a CPU; reserved on MPS with PyTorch {torch.__version__}")
    for codes in (16, 32, 64):
        grids, options = [VQGrid(np.zeros((codes, codes), dtype="int32"), 16384)], DecodeOptions(steps=2)
        with on_meta(), Attentions(), LiveBytes() as sampling:
            latents = decoder.sample(grids, options)
        with on_meta(), Attentions(), LiveBytes() as decoding:
            vae.decode(latents)
        for name, live, reserved in (
            ("decoder", sampling, [Decoder.working_bytes(checkpoint, PART, grids, options, d) for d in (CPU, MPS)]),
            ("VAE", decoding, [VAE.working_bytes(checkpoint, latents, device) for device in (CPU, MPS)]),
        ):
            numbers = " ".join(f"{value / GB:8.2f}" for value in (live.peak, *reserved))
            print(f"  {32 * codes:5} x {32 * codes:<5} {name:8} {numbers}", flush=True)


def measure(pixels: int) -> None:
    """Print what decoding one picture adds to the most memory that this process has had."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL(**VAE_CONFIG).eval().requires_grad_(False)
    before = _peak()
    with torch.no_grad():
        model.decode(torch.zeros(1, 16, pixels // 8, pixels // 8))
    grown = _peak() - before
    print(f"{pixels} x {pixels}: {grown / GB:.2f} GB, {grown / pixels**2:.0f} bytes a pixel")


def _peak() -> int:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.memory", description="Count or measure memory of decoding.")
    parser.add_argument("--vae", type=int, metavar="PIXELS", help="decode a picture of this side with random weights")
    if pixels := parser.parse_args().vae:
        measure(pixels)
    else:
        with tempfile.TemporaryDirectory() as folder:
            count(hollow_checkpoint(Path(folder)))


if __name__ == "__main__":
    main()
