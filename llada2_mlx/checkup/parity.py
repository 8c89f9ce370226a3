"""Whether this machine computes what it should: the built-in model on MLX and on PyTorch, against recorded results.

The record was made on a CPU in float32, by code that gives the published code's tokens on the golden fixtures.
``python -m llada2_mlx.checkup.parity`` makes it anew, which is needed when the built-in model changes.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checkpoint.layout import BUILT_IN, Checkpoint, Part
from ..errors import LLaDA2Error
from ..progress import Progress
from ..vq import VQGrid

if TYPE_CHECKING:
    import mlx.core as mx
    import torch

    from ..backbone.network import LLaDA2
    from ..imaging.decoder import LatentDecoder

RECORD = BUILT_IN.parent / "parity.safetensors"
PROMPT = "A large red circle in the top left and a small blue star in the bottom right, on a plain white background"
# Relative errors. Float32 stays far below the first everywhere; chips that multiply float32 with 10 bits stay below the second,
# and a kernel that is wrong does not. The third is for bf16, whose 8 bits every layer rounds to.
EXACT, REDUCED, ROUNDED = 1e-4, 1e-2, 5e-2
_SIDE = 8  # codes, of the picture
_BLOCK = 32  # positions
_STEPS, _SEED = 3, 7  # of the decoder
_EVERY = 4  # of how many pixels one is recorded


class Verdict(Enum):
    """What became of a check; the value is what a person reads."""

    EQUAL = "equal"
    REDUCED = "equal, with reduced precision"
    WRONG = "WRONG"


@dataclass(frozen=True)
class Check:
    """One comparison.

    Args:
        where: what computed it: "MLX, gpu", "PyTorch, mps".
        what: what was computed.
        verdict: whether it is what was recorded.
        told: figures, or what went wrong.
        error: relative to what was recorded; None where numbers were counted instead, or nothing came out.
    """

    where: str
    what: str
    verdict: Verdict
    told: str
    error: float | None = None


def checks(device: torch.device | None = None) -> Iterator[Check]:
    """All comparisons, one after the other.

    Args:
        device: where PyTorch runs; the library's choice if None.
    """
    built_in = Checkpoint(BUILT_IN)
    yield from of_mlx(built_in)
    yield from of_torch(built_in, device)


def of_mlx(checkpoint: Checkpoint) -> Iterator[Check]:
    """What MLX computes, compared; what it raises is a comparison that failed.

    Args:
        checkpoint: the built-in model, of which the record is.
    """
    yield from _guarded("MLX", _of_mlx(checkpoint))


def of_torch(checkpoint: Checkpoint, device: torch.device | None = None) -> Iterator[Check]:
    """What PyTorch computes, as ``of_mlx``."""
    yield from _guarded("PyTorch", _of_torch(checkpoint, device))


def recorded() -> dict[str, np.ndarray]:
    """What ``record`` gave."""
    from safetensors.numpy import load_file

    return load_file(RECORD)


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    """The norm of the difference over the norm of what is expected; infinite where something is not finite."""
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        return float("inf")
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def typical(actual: np.ndarray, expected: np.ndarray) -> float:
    """The relative error within which 95 % of the positions are; infinite where one is off by more than half.

    A position between two experts may be given to the other one by the last bit, and is then a sixth off or so.

    Args:
        actual, expected: [..., positions, width].
    """
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        return float("inf")
    errors = np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    return float(np.quantile(errors, 0.95)) if errors.max() <= 0.5 else float("inf")


def in_float32(where: str, what: str, error: float) -> Check:
    """A check of numbers that were computed in float32."""
    verdict = Verdict.EQUAL if error <= EXACT else Verdict.REDUCED if error <= REDUCED else Verdict.WRONG
    return Check(where, what, verdict, f"relative error {error:.1e}, allowed {REDUCED:.0e}", error)


def in_bf16(where: str, what: str, error: float) -> Check:
    """A check of numbers that were computed in bf16, or may have been."""
    verdict = Verdict.EQUAL if error <= ROUNDED else Verdict.WRONG
    return Check(where, what, verdict, f"relative error {error:.1e}, allowed {ROUNDED:.0e}", error)


def of_codes(where: str, what: str, actual: np.ndarray, expected: np.ndarray) -> Check:
    """A check of integers, which have to be the same."""
    equal = int((actual == expected).sum()) if actual.shape == expected.shape else 0
    verdict = Verdict.EQUAL if equal == expected.size else Verdict.WRONG
    return Check(where, what, verdict, f"{equal} of {expected.size} equal")


def _guarded(where: str, some: Iterator[Check]) -> Iterator[Check]:
    try:
        yield from some
    except Exception as error:  # whatever a library that is broken here raises
        yield Check(
            where, "the built-in model", Verdict.WRONG, f"{type(error).__name__}: {' '.join(str(error).split())}"
        )


def _of_mlx(checkpoint: Checkpoint) -> Iterator[Check]:
    import mlx.core as mx

    from ..backbone.handle import Backbone

    where = f"MLX, {'gpu' if mx.default_device().type == mx.DeviceType.gpu else 'cpu'}"
    record = recorded()
    codes = record["drawn"]
    for precision, check in (("bf16", in_bf16), ("float32", in_float32)):
        backbone = Backbone(checkpoint, precision)
        yield check(where, f"language model, {precision}", typical(_hidden(backbone, codes), record["hidden"]))
    # in bf16 candidates that nearly tie may change places, and what is drawn after them
    yield of_codes(where, "drawing, float32", _draw(backbone), codes)
    for bits in (8, 4):
        small, exact = backbone.run(_few_bits, bits=bits, ids=_ids(backbone, codes))
        yield in_bf16(where, f"language model, {bits} bits", typical(small, exact))
    for tokens in (4, 96):  # few are multiplied as they come, many sorted by expert
        small, exact = backbone.run(_experts, tokens=tokens)
        yield in_bf16(where, f"256 experts in 4 bits, {tokens} tokens", typical(small, exact))
    latent, type_name = _latent_of_mlx(checkpoint, codes)
    check = in_float32 if type_name == "float32" else in_bf16
    yield check(where, f"decoder's transformer, {type_name}", relative(latent, record["latent"]))


def _of_torch(checkpoint: Checkpoint, device: torch.device | None) -> Iterator[Check]:
    from ..imaging.device import default_device

    record, device = recorded(), device or default_device()
    where = f"PyTorch, {device.type}"
    yield of_codes(where, "image tokenizer, float32", _encode(checkpoint, device, record["picture"]), record["encoded"])
    for name, whole, check in (("float32", True, in_float32), ("bf16", False, in_bf16)):
        latent = _latent(checkpoint, device, record["drawn"], whole)
        yield check(where, f"decoder, {name}", relative(latent, record["latent"]))
    pixels = _pixels(checkpoint, device, record["latent"])
    yield in_float32(where, "VAE, float32", relative(pixels, record["pixels"]))


def _ids(backbone: Any, codes: np.ndarray) -> list[int]:
    """The prompt, and a picture after it."""
    from .. import prompts

    tokens = backbone.tokens
    prompt = prompts.text_to_image(tokens, PROMPT, *codes.shape).conditional
    return [*prompt, *tokens.codes_to_ids(codes.flatten().tolist())]


def _hidden(backbone: Any, codes: np.ndarray) -> np.ndarray:
    """Hidden states [positions, hidden] float32 of prompt and picture, under the mask of the blocks."""
    return backbone.run(_forward, ids=_ids(backbone, codes))


def _forward(network: LLaDA2, ids: list[int]) -> Generator[Progress, None, np.ndarray]:
    yield Progress("comparing", 1, 1)
    return _states(network, ids)


def _states(network: LLaDA2, ids: list[int]) -> np.ndarray:
    import mlx.core as mx

    from ..backbone.session import block_mask

    hidden = network(mx.array([ids]), mask=block_mask(0, len(ids), _BLOCK, None))
    return np.array(hidden[0].astype(mx.float32))


def _draw(backbone: Any) -> np.ndarray:
    """The codes of a picture, drawn with guidance at the defaults of the node."""
    from .. import tasks

    side = _SIDE * 32
    return tasks.text_to_vq(backbone, PROMPT, side, side).grid.codes


def _few_bits(network: LLaDA2, bits: int, ids: list[int]) -> Generator[Progress, None, tuple[np.ndarray, np.ndarray]]:
    """Hidden states by the kernels for few bits, and in float32 by what their weights stand for."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from ..backbone.precision import build, parameter_type, run_type, scheme

    yield Progress("comparing", 1, 2)
    block = scheme(network.config, bits)
    small, exact = build(network.config, block), build(network.config)
    parameters = dict(tree_flatten(network.parameters()))
    kept, dense = _quantized(small, parameters)
    dtype = run_type(f"{bits}bit")
    cast = lambda name, value: value if value.dtype == mx.uint32 else value.astype(parameter_type(name, dtype))
    small.load_weights([(name, cast(name, value)) for name, value in kept.items()])
    exact.load_weights(list(dense.items()))
    return _states(small, ids), _states(exact, ids)


def _quantized(small: Any, parameters: dict[str, mx.array]) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    """The weights of a network as ``small`` has its matrices, and what those stand for; both by the names they have."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    kept, dense = dict(parameters), dict(parameters)
    for path, module in tree_flatten(small.leaf_modules(), is_leaf=nn.Module.is_module):
        if "scales" not in module:
            continue
        how = {"group_size": module.group_size, "bits": module.bits}
        # scales as bf16 has them, so that both networks have the same
        packed, *rest = mx.quantize(mx.contiguous(kept.pop(f"{path}.weight")), **how)
        scales, biases = (each.astype(mx.bfloat16).astype(mx.float32) for each in rest)
        kept |= {f"{path}.weight": packed, f"{path}.scales": scales, f"{path}.biases": biases}
        dense[f"{path}.weight"] = mx.dequantize(packed, scales, biases, **how)
    return kept, dense


def _experts(network: LLaDA2, tokens: int) -> Generator[Progress, None, tuple[np.ndarray, np.ndarray]]:
    """As many experts as the published model has, in 4 bits: [tokens, chosen, width] by MLX, and by numpy.

    Kernels for few bits have failed for many experts or many rows alone, on some chips alone.
    """
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.models.switch_layers import SwitchGLU

    from ..backbone.precision import run_type

    yield Progress("comparing", 1, 1)
    experts, chosen, width, inner = 256, 8, 256, 128
    small = SwitchGLU(width, inner, experts)
    nn.quantize(small, group_size=64, bits=4)
    draw, dtype = np.random.default_rng(0), run_type("4bit")
    shapes = {"gate_proj.weight": (inner, width), "up_proj.weight": (inner, width), "down_proj.weight": (width, inner)}
    weights = {
        name: mx.array((draw.standard_normal((experts, *shape)) * shape[1] ** -0.5).astype(np.float32))
        for name, shape in shapes.items()
    }
    kept, dense = _quantized(small, weights)
    small.load_weights([(n, v if v.dtype == mx.uint32 else v.astype(dtype)) for n, v in kept.items()])
    x = mx.array(draw.standard_normal((tokens, width)).astype(np.float32)).astype(dtype)
    which = np.stack([draw.permutation(experts)[:chosen] for _ in range(tokens)])
    found = np.array(small(x, mx.array(which.astype(np.uint32))).astype(mx.float32))
    gate, up, down = (np.array(dense[name]) for name in shapes)
    expected, inputs = np.empty_like(found), np.array(x.astype(mx.float32))
    for token, row in enumerate(which):
        for place, expert in enumerate(row):
            opened = gate[expert] @ inputs[token]
            expected[token, place] = down[expert] @ (opened / (1 + np.exp(-opened)) * (up[expert] @ inputs[token]))
    return found, expected


def _encode(checkpoint: Checkpoint, device: torch.device, picture: np.ndarray) -> np.ndarray:
    """Codes of a picture [height, width, 3] uint8, in float32 whatever type the weights are stored in."""
    from PIL import Image

    from ..imaging import load_part

    tokenizer = load_part(checkpoint, Part.IMAGE_TOKENIZER, device)
    tokenizer.vision.float()
    tokenizer.quantiser.float()
    return tokenizer.encode_prepared([Image.fromarray(picture)])[0].codes


def _latent(checkpoint: Checkpoint, device: torch.device, codes: np.ndarray, whole: bool) -> np.ndarray:
    """A latent [16, height, width] after few steps of the turbo decoder, with guidance.

    Args:
        whole: in float32 whatever type the weights are stored in; else in bf16.
    """
    import torch

    from ..imaging import load_part

    decoder = load_part(checkpoint, Part.DECODER_TURBO, device)
    for module in (decoder.transformer, decoder.prior):
        torch.nn.Module.to(module, torch.float32 if whole else torch.bfloat16)  # diffusers' own warns of nothing
    return _sampled(decoder, codes)


def _latent_of_mlx(checkpoint: Checkpoint, codes: np.ndarray) -> tuple[np.ndarray, str]:
    """The same with the transformer in MLX, in the type that it has there: "bf16" on Metal, "float32" on a CPU."""
    import mlx.core as mx

    from ..imaging import load_part
    from ..imaging.decoder import MLX

    decoder = load_part(checkpoint, Part.DECODER_TURBO, engine=MLX)
    decoder.prior.float()
    whole = decoder.transformer.x_pad_token.dtype == mx.float32
    try:
        return _sampled(decoder, codes), "float32" if whole else "bf16"
    finally:
        decoder.unload()


def _sampled(decoder: LatentDecoder, codes: np.ndarray) -> np.ndarray:
    from ..imaging.flow import DecodeOptions

    grid = VQGrid(codes, decoder.codebook_size)
    return decoder.sample([grid], DecodeOptions(steps=_STEPS, seed=_SEED))[0].cpu().numpy()


def _pixels(checkpoint: Checkpoint, device: torch.device, latent: np.ndarray) -> np.ndarray:
    """Some of the pixels of a latent, [height, width, 3] float32."""
    import torch

    from ..imaging import load_part

    return load_part(checkpoint, Part.VAE, device).decode(torch.from_numpy(latent)[None])[0, ::_EVERY, ::_EVERY].numpy()


def record(picture: np.ndarray) -> dict[str, np.ndarray]:
    """What the built-in model gives on a CPU in float32.

    Args:
        picture: what the image tokenizer is to read, [128, 128, 3] uint8; its codes have to be the same where 10 bits are
            multiplied, which ``tests/checkup/test_parity.py`` tries.

    Returns:
        ``drawn`` and ``encoded``, codes [8, 8]; the ``picture``; ``hidden`` [positions,
        hidden], ``latent`` [16, 32, 32] and ``pixels`` [64, 64, 3], float32.

    Raises:
        LLaDA2Error: MLX does not run on the CPU here.
    """
    import torch

    from ..backbone.handle import Backbone
    from ..backbone.precision import on_cpu

    if not on_cpu():
        raise LLaDA2Error(
            "The record has to be made where MLX runs on the CPU: call mx.set_default_device(mx.cpu) first."
        )
    checkpoint, cpu = Checkpoint(BUILT_IN), torch.device("cpu")
    backbone = Backbone(checkpoint, "float32")
    drawn = _draw(backbone)
    latent = _latent(checkpoint, cpu, drawn, whole=True)
    return {
        "drawn": drawn,
        "hidden": _hidden(backbone, drawn),
        "picture": picture,
        "encoded": _encode(checkpoint, cpu, picture),
        "latent": latent,
        "pixels": np.ascontiguousarray(_pixels(checkpoint, cpu, latent)),
    }


if __name__ == "__main__":
    import argparse

    from PIL import Image
    from safetensors.numpy import save_file

    parser = argparse.ArgumentParser(description="Record anew what the built-in model gives.")
    parser.add_argument(
        "picture", nargs="?", help="128 x 128 pixels, to be encoded; the one of the last record if left out"
    )
    given = parser.parse_args().picture
    picture = np.array(Image.open(given).convert("RGB")) if given else recorded()["picture"]
    save_file(record(picture), RECORD)
    print(f"{RECORD}: {RECORD.stat().st_size} bytes")
