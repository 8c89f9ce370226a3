"""Where PyTorch runs, and how its weights are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..errors import CheckpointError


def default_device() -> torch.device:
    """MPS, CUDA or the CPU: the first that there is."""
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_float64(device: torch.device) -> bool:
    """Whether the device computes in double precision; MPS does not."""
    return device.type != "mps"


def read_tensors(path: Path, device: torch.device, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, or of a ``.pt`` state dict, read straight onto the device.

    Args:
        dtype: what to convert them to; None keeps the type that they are stored in.

    Raises:
        CheckpointError: the file is damaged, or a tensor holds values that are not finite.
    """
    with _explained(path):
        if path.suffix == ".pt":
            tensors = torch.load(path, map_location=device, weights_only=True)
        else:
            tensors = load_file(path, device=str(device))
    finite = torch.stack([torch.isfinite(tensor).all() for tensor in tensors.values()]).tolist()
    if bad := [name for name, ok in zip(tensors, finite, strict=True) if not ok]:
        raise CheckpointError(
            f"{path} holds values that are not finite (NaN or infinity) in {bad[0]}. Download it again."
        )
    return {name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items()}


def read_shapes(path: Path) -> dict[str, torch.Size]:
    """Shapes of the tensors in a ``.pt`` state dict, whose values are mapped and not read.

    Raises:
        CheckpointError: the file is damaged.
    """
    with _explained(path):
        return {
            name: tensor.shape
            for name, tensor in torch.load(path, map_location="cpu", mmap=True, weights_only=True).items()
        }


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except Exception as error:  # torch.load raises whatever its reader raises
        raise CheckpointError(
            f"{path} cannot be read: it is truncated or damaged ({error}). Download it again."
        ) from error


def load_module(module: torch.nn.Module, tensors: dict[str, torch.Tensor], where: Path) -> torch.nn.Module:
    """``module`` with exactly these weights, in their own type, ready to run; build it on the meta device.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape.
    """
    try:
        module.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"The tensors in {where} do not fit its config: {' '.join(str(error).split())}") from None
    return module.eval().requires_grad_(False)
