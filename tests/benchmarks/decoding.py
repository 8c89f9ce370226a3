"""What MLX has in memory beside the weights while the decoder works, by its own counter.

``python -m benchmarks.decoding`` in ``tests/``. Random networks in which one size at a time is changed; with ``--published`` as wide as
the published one, but of one layer of each kind: 3 GB, 20 minutes. ``metal``: in bf16, and in place of attention and norms, which a CPU
computes in many operations, one operation each that makes what Metal's kernel makes: its result.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import torch
from rehearsal.pieces import DECODER, FEATURES
from synthetic import randomise

from llada2_mlx.checkpoint.layout import Checkpoint, Part
from llada2_mlx.imaging import decoder_copy, transformer_mlx
from llada2_mlx.imaging.decoder import decoder_folder
from llada2_mlx.imaging.decoder_copy import CACHE, work_bytes
from llada2_mlx.imaging.decoder_mlx import MLXDecoder
from llada2_mlx.imaging.flow import DecodeOptions
from llada2_mlx.imaging.prior import FEATURE_UPSAMPLING
from llada2_mlx.shapes.training import export
from llada2_mlx.vq import VQGrid

CODES = 256
SMALL: dict[str, Any] = {"dim": 192, "n_heads": 2, "n_layers": 2, "n_refiner_layers": 1, "axes_dims": [32, 32, 32]}
PLAIN = DecodeOptions(steps=2, guidance=0.0)
GUIDED = replace(PLAIN, guidance=1.0)


@dataclass(frozen=True)
class Case:
    """A decoder, and what it is to decode.

    Args:
        config: what differs from ``SMALL``.
        side: codes of a square picture.
        piece: tokens of a piece.
        metal: see above; else as on this machine, in float32.
        quantised: with 8 bits.
        features: width of the condition.
    """

    config: dict[str, Any]
    side: int = 12
    options: DecodeOptions = PLAIN
    piece: int = 256
    metal: bool = True
    quantised: bool = False
    features: int = 32
    pictures: int = 1


KERNELS: dict[str, Callable[..., mx.array]] = {
    "scaled_dot_product_attention": lambda queries, keys, values, scale: queries * scale,
    "rms_norm": lambda x, weight, eps: x * weight,
    "layer_norm": lambda x, weight, bias, eps: x * weight,
}


@dataclass(frozen=True)
class Peak:
    """Bytes beside the weights: the most that MLX had at once, and what ``work_bytes`` says, without the buffers that MLX may keep."""

    most: int
    reckoned: int


CASES = {
    "as it is": Case({}),
    "as it is, on a CPU": Case({}, metal=False),
    "8 bits": Case({}, quantised=True),
    "guidance": Case({}, options=GUIDED),
    "guidance, on a CPU": Case({}, options=GUIDED, metal=False),
    "a step cache": Case({}, options=replace(GUIDED, steps=3, cache_threshold=0.1)),
    "two pictures": Case({}, options=GUIDED, pictures=2),
    "without upscale": Case({}, options=replace(PLAIN, upscale=1)),
    "a larger picture": Case({}, side=16),
    "in one piece": Case({}, piece=2048),
    "in one piece, on a CPU": Case({}, piece=2048, metal=False),
    "twice the heads": Case({"n_heads": 4, "axes_dims": [16, 16, 16]}),
    "half the width": Case({"dim": 96, "n_heads": 1}),
    "4 layers, not 2": Case({"n_layers": 4}),
    "a wide condition": Case({}, features=768),
}
# All layers are of one size, and what one has made is gone when the next begins: one of each kind finds the peak.
WIDE: dict[str, Any] = {
    "config": {name: DECODER[name] for name in ("dim", "n_heads", "axes_dims")} | {"n_layers": 1},
    "features": FEATURES,
    "piece": transformer_mlx.PIECE,
}
PUBLISHED = {
    "512 x 512": Case(side=16, **WIDE),
    "512 x 512, guidance": Case(side=16, options=GUIDED, **WIDE),
    "1024 x 1024": Case(side=32, **WIDE),
}


def write(folder: Path, case: Case) -> Checkpoint:
    """A decoder with random weights in bf16, and its prior."""
    from diffusers import ZImageTransformer2DModel

    config, features = SMALL | case.config, case.features
    config |= {"n_kv_heads": config["n_heads"], "axes_lens": [4096, 512, 512]}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        module = ZImageTransformer2DModel(**config, cap_feat_dim=features)
        randomise(module)
        shapes = {
            "prior_token_embedding.weight": (CODES, features),
            "prior_projector.net.0.proj.weight": (features, features),
            "prior_projector.net.0.proj.bias": (features,),
            "prior_projector.net.2.weight": (features, features),
            "prior_projector.net.2.bias": (features,),
        }
        prior = {name: torch.randn(shape).mul(features**-0.5).bfloat16() for name, shape in shapes.items()}
    (folder / "image_tokenizer").mkdir(parents=True)
    export.write_prior(folder, prior)
    export.write_decoder(folder / "decoder-turbo", module, config, torch.bfloat16)
    return Checkpoint(folder)


def peak(case: Case) -> Peak:
    """The bytes of one call of each branch."""
    with tempfile.TemporaryDirectory() as folder:
        return _peak(write(Path(folder) / "model", case), case)


def _peak(checkpoint: Checkpoint, case: Case) -> Peak:
    grid = VQGrid(np.random.default_rng(0).integers(0, CODES, (case.side, case.side)), CODES)
    with _as_in(case):
        decoder = MLXDecoder(checkpoint, Part.DECODER_TURBO, quantised=case.quantised)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        decoder.sample([grid] * case.pictures, case.options)
        most = mx.get_peak_memory() - before
        decoder.unload()
        folder = checkpoint.root / decoder_folder(Part.DECODER_TURBO)
        return Peak(most, work_bytes(folder, [grid] * case.pictures, case.options) - CACHE)


@contextmanager
def _as_in(case: Case) -> Iterator[None]:
    """In this context a decoder runs as ``case`` says."""
    with ExitStack() as stack:
        for module in (transformer_mlx, decoder_copy):
            stack.enter_context(patch.object(module, "PIECE", case.piece))
        if case.metal:
            stack.enter_context(patch.object(decoder_copy, "on_cpu", lambda: False))
            for name, operation in KERNELS.items():
                stack.enter_context(patch.object(mx.fast, name, operation))
        yield


def main(tell: Callable[[str], None] = print, cases: Mapping[str, Case] = CASES) -> None:
    tell("| changed | tokens | in a piece | MB | MB reckoned | times |\n|---|---|---|---|---|---|")
    for name, case in cases.items():
        found = peak(case)
        tokens = case.side**2 * (FEATURE_UPSAMPLING**2 + case.options.upscale**2)
        sizes = f"{found.most / 1e6:.2f} | {found.reckoned / 1e6:.2f} | {found.reckoned / found.most:.2f}"
        tell(f"| {name} | {tokens:,} | {min(case.piece, tokens):,} | {sizes} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--published", action="store_true", help="as wide as the published decoder")
    main(cases=PUBLISHED if parser.parse_args().published else CASES)
