"""Where PyTorch runs, and how its weights are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open

from ..checkpoint.config import require_possible
from ..checkpoint.hub import again
from ..checkpoint.layout import Checkpoint, TensorInfo, check_tensors, safetensors_header
from ..errors import CheckpointError, RequestError
from ..progress import OnStep, Progress, ignore

T = TypeVar("T")


def default_device() -> torch.device:
    """MPS, CUDA or the CPU: the first that there is."""
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_float64(device: torch.device) -> bool:
    """Whether the device computes in double precision; MPS does not."""
    return device.type != "mps"


def synchronize(device: torch.device) -> None:
    """Wait until an MPS device has done what it was given; other devices are not waited for."""
    if device.type == "mps":
        torch.mps.synchronize()


def read_tensors(
    path: Path, device: torch.device, dtype: torch.dtype | None = None, on_step: OnStep = ignore
) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, read one by one, straight onto the device.

    Args:
        dtype: what to convert them to; None keeps the type that they are stored in.
        on_step: called after each tensor; what it raises ends the work.

    Raises:
        CheckpointError: the file is damaged, or a tensor holds values that are not finite.
    """
    names = list(header := safetensors_header(path))  # says whether the file is whole
    if strange := [
        f"{name} ({info.dtype})" for name, info in header.items() if info.dtype not in ("BF16", "F16", "F32")
    ]:
        raise CheckpointError(f"{path} holds {strange[0]}; only weights in BF16, F16 or F32 can be read.")
    tensors = {}
    with safe_open(path, framework="pt", device="cpu" if device.type == "cpu" else str(device)) as file:
        for done, name in enumerate(names, 1):
            tensor = file.get_tensor(name)
            tensors[name] = tensor.to(dtype or tensor.dtype)
            on_step(Progress("loading weights", done, len(names)))
    return _finite(tensors, path)


def read_state_dict(path: Path, device: torch.device | None = None) -> dict[str, torch.Tensor]:
    """A ``.pt`` state dict; without a device its values are mapped and not read, for their shapes.

    Raises:
        CheckpointError: the file is damaged, or a tensor holds values that are not finite.
    """
    try:
        tensors = torch.load(path, map_location="cpu", mmap=device is None, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except Exception as error:  # torch.load raises whatever its readers raise
        raise CheckpointError(f"{path} cannot be read: it is truncated or damaged ({error}). {again(path)}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{path} is not a state dict. {again(path)}")
    return tensors if device is None else _finite({name: tensor.to(device) for name, tensor in tensors.items()}, path)


def usable(name: str) -> torch.device:
    """The device that a person names.

    Raises:
        RequestError: PyTorch does not know it, or this machine does not have it.
    """
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RequestError(
            f"The device {name!r} cannot be used ({str(error).splitlines()[0]}); try mps, cuda or cpu."
        ) from None
    return device


def _finite(tensors: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    finite = torch.stack([torch.isfinite(tensor).all() for tensor in tensors.values()]).tolist() if tensors else []
    if bad := [name for name, ok in zip(tensors, finite, strict=True) if not ok]:
        raise CheckpointError(f"{path} holds values that are not finite (NaN or infinity) in {bad[0]}. {again(path)}")
    return tensors


def load_module(module: torch.nn.Module, tensors: dict[str, torch.Tensor], where: Path) -> torch.nn.Module:
    """``module`` with exactly these weights, in their own type, ready to run; build it on the meta device.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape.
    """
    # PyTorch would name every tensor that is missing, thousands where a config has a layer too many
    found = {name: TensorInfo(where, tuple(tensor.shape), "") for name, tensor in tensors.items()}
    check_tensors(found, {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}, where)
    try:
        module.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"The tensors in {where} do not fit its config: {' '.join(str(error).split())}") from None
    return module.eval().requires_grad_(False)


def build(make: Callable[[], T], config: Path) -> T:
    """``make()`` on the meta device, where a network takes no memory.

    Raises:
        CheckpointError: the library cannot build a network from what the config says.
    """
    try:
        with torch.device("meta"):
            return make()
    except Exception as error:  # whatever a library makes of values that it does not expect
        raise CheckpointError(f"{config} describes no network that can be built ({error}). {again(config)}") from error


def read_config(checkpoint: Checkpoint, folder: str) -> dict[str, Any]:
    """The config of a part without the keys that are the library's own.

    Raises:
        CheckpointError: it cannot be read, or is of a network that cannot be.
    """
    stated = checkpoint.json(name := f"{folder}/config.json")
    require_possible(stated, checkpoint.root / name)
    return {key: value for key, value in stated.items() if not key.startswith("_")}
