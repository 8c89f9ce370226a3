"""What the decoder runs in: PyTorch or MLX, as asked for, or what fits this machine and is right on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..checkpoint.layout import Checkpoint, Part
from ..errors import RequestError
from ..progress import OnStep, amount, ignore
from ..vq import VQGrid
from ..worker import machine_bytes
from .attention import is_old
from .decoder import AUTO, ENGINES, MLX, MLX_8BIT, TORCH, LatentDecoder, decoder_folder
from .decoder_copy import BITS, block_of, memory_bytes, weights_of, work_bytes
from .device import default_device
from .flow import DecodeOptions
from .transformer_torch import Decoder


@dataclass(frozen=True)
class Plan:
    """How a decoder will run.

    Args:
        engine: ``TORCH``, ``MLX`` or ``MLX_8BIT``.
        size: bytes that the weights take.
        working: bytes that the work takes beside them.
        reason: a sentence on why ``auto`` took this engine; None where nothing was to be chosen.
    """

    engine: str
    size: int
    working: int
    reason: str | None = None


def check_engine(checkpoint: Checkpoint, part: Part, engine: str) -> None:
    """Say what can be known before any work of an engine that cannot be had.

    Raises:
        RequestError: there is no such engine, or it cannot run this decoder.
        CheckpointError: the decoder is missing, or its config cannot be used.
    """
    if engine not in ENGINES:
        raise RequestError(f"There is no engine {engine!r}; there are {', '.join(ENGINES)}.")
    checkpoint.require(part)
    if engine == TORCH and block_of(checkpoint.root / decoder_folder(part)) is not None:
        raise RequestError(
            f"The {part.value} of {checkpoint.root.name} has {BITS} bits, which only MLX runs. Choose the engine {AUTO} or {MLX}, "
            "or the model that it was made of."
        )


def plan(
    checkpoint: Checkpoint,
    part: Part,
    engine: str,
    grids: Sequence[VQGrid],
    options: DecodeOptions,
    device: torch.device | None = None,
) -> Plan:
    """How a decoder will run for some pictures; headers are read, no weights.

    ``auto`` is PyTorch but on a Mac. There it is PyTorch where its attention is new enough and the decoder fits into what Metal recommends
    to use, else MLX, with 8 bits where the decoder as it is does not fit.

    Args:
        engine: one of ``ENGINES``.
        device: where PyTorch would run; the library's choice if None.

    Raises:
        RequestError, CheckpointError: as ``check_engine``.
    """
    check_engine(checkpoint, part, engine)
    folder, device, reason = checkpoint.root / decoder_folder(part), device or default_device(), None
    whole = checkpoint.weight_bytes(part)
    in_mlx = work_bytes(folder, grids, options)
    working = {MLX: in_mlx, MLX_8BIT: in_mlx, TORCH: Decoder.working_bytes(checkpoint, part, grids, options, device)}
    quantised = block_of(folder) is not None
    if engine == AUTO:
        engine, reason = _choose(whole, working[TORCH], working[MLX], quantised, device)
    size = whole
    if engine != TORCH:
        size += (
            memory_bytes(folder, engine == MLX_8BIT) - weights_of(folder).stat().st_size
        )  # what is left is the prior
    return Plan(engine, size, working[engine], reason)


def open_decoder(
    checkpoint: Checkpoint, part: Part, engine: str, device: torch.device | None = None, on_step: OnStep = ignore
) -> LatentDecoder:
    """Load a decoder into an engine.

    Args:
        engine: ``TORCH``, ``MLX`` or ``MLX_8BIT``, which makes its copy unless it is there.
        device: where PyTorch runs; the library's choice if None.
        on_step: called as the weights are read; what it raises ends the work.

    Raises:
        CheckpointError, RequestError, LLaDA2Error: as the classes say.
    """
    if engine == TORCH:
        return Decoder(checkpoint, part, device, on_step)
    from .decoder_mlx import MLXDecoder

    return MLXDecoder(checkpoint, part, on_step, quantised=engine == MLX_8BIT)


def _choose(
    whole: int, work_torch: int, work_mlx: int, quantised: bool, device: torch.device
) -> tuple[str, str | None]:
    """The engine that ``auto`` is, and why."""
    if quantised:
        return MLX, f"Decoder: MLX, because this one has {BITS} bits, which PyTorch does not run."
    if device.type != "mps":  # MLX is made for Apple silicon
        return TORCH, None
    memory = machine_bytes()
    there = f"in the {amount(memory)} that Metal recommends to use"
    if not is_old() and whole + work_torch <= memory:
        return TORCH, f"Decoder: PyTorch. It takes {amount(whole)}, and {amount(work_torch)} to work, {there}."
    if whole + work_mlx > memory:
        return MLX_8BIT, (
            f"Decoder: MLX with {BITS} bits. As it is it takes {amount(whole)}, and {amount(work_mlx)} to work, {there}."
        )
    if is_old():
        return MLX, (
            f"Decoder: MLX, because attention of PyTorch {torch.__version__.partition('+')[0]} on MPS is slow and writes its scores "
            "out; 2.13 or later does not."
        )
    return MLX, f"Decoder: MLX. In PyTorch it takes {amount(whole)}, and {amount(work_torch)} to work, {there}."
