"""Counts what a network has in memory and how many scores its attentions make, at full size and without values.

On the meta device a tensor has a shape and no values, so that the published decoder runs anywhere.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rehearsal.pieces import write_drawing_parts, write_hollow
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llada2_mlx.checkpoint.layout import Checkpoint, safetensors_header
from llada2_mlx.imaging import attention, prior, transformer_torch, vae

CPU, META = torch.device("cpu"), torch.device("meta")


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operations make in its context, and how many bytes of them are there at once.

    What a kernel takes for itself within an operation is not seen. On the meta device a tensor has no values: whatever
    the code asks of one is true, or 1, and what is copied from there to the CPU is zero.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        if given and given[0].device == META:
            if function is torch.ops.aten._local_scalar_dense.default:
                return 1
            if function is torch.ops.aten._to_copy.default and kwargs.get("device") == CPU:
                return torch.zeros(given[0].shape, dtype=kwargs.get("dtype") or given[0].dtype)
        result = function(*args, **kwargs)
        theirs = {value.untyped_storage()._cdata for value in given}
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if (key := storage._cdata) not in self._known and key not in theirs:
                    self._known[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, key)
        self.peak = max(self.peak, self.now)
        return result

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key)


class Attentions(TorchFunctionMode):
    """Notes how many scores each attention makes, and gives an empty result in place of it.

    Args:
        writes: whether scores are written out, as ``attention.score_bytes`` says that MPS does; by the width of a head.
    """

    def __init__(self, writes: dict[int, bool] | None = None) -> None:
        super().__init__()
        self.writes, self.scores = writes or {}, []

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is not functional.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(self, query, key, value, *_: Any, **__: Any) -> torch.Tensor:
        shape = (*query.shape[:-1], key.shape[-2])
        self.scores.append(torch.Size(shape).numel())
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        if self.writes.get(query.shape[-1]):
            written = [query.new_empty(shape, dtype=dtype) for dtype in (torch.float32, torch.float32, query.dtype)]
            del written
        return result


def hollow_checkpoint(folder: Path, layers: int = 1) -> Checkpoint:
    """The published decoder, with fewer main layers, and VAE, as files without values that take no room on the disk."""
    write_drawing_parts(
        folder, lambda _, shape: torch.zeros(1, dtype=torch.bfloat16).expand(shape), write_hollow, layers
    )
    return Checkpoint(folder)


@contextmanager
def on_meta(as_mps: bool = False) -> Iterator[None]:
    """In this context weights are read as shapes on the meta device; with ``as_mps`` networks attend there as on MPS."""

    def shapes(path: Path, device: torch.device, dtype: torch.dtype | None = None, on_step: Any = None) -> dict:
        types = {"BF16": torch.bfloat16, "F32": torch.float32}
        header = safetensors_header(path).items()
        return {name: torch.empty(info.shape, dtype=dtype or types[info.dtype], device=META) for name, info in header}

    def state_dict(path: Path, device: torch.device | None = None) -> dict:
        return {name: tensor.to(META) for name, tensor in torch.load(path, weights_only=True).items()}

    with ExitStack() as stack:
        for module in (transformer_torch, vae):
            stack.enter_context(patch.object(module, "read_tensors", shapes))
            if as_mps:
                as_on_mps = lambda device: attention.attention_for(torch.device("mps"))
                stack.enter_context(patch.object(module, "attention_for", as_on_mps))
        stack.enter_context(patch.object(prior, "read_state_dict", state_dict))
        yield
