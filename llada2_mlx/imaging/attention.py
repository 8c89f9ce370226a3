"""Attention in pieces, so that no matrix of scores grows beyond what a device gets right.

PyTorch before 2.13 writes all scores out on MPS, in float32; above 2^31 elements the result is silently wrong, above 2^32
the process aborts (pytorch/pytorch#149261, #179592). Every query attends on its own, so queries can be cut.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

SCORES = 2**29  # elements that a matrix of scores may have
# the PyTorch whose MPS attention writes no scores out, for heads of these widths (pytorch/pytorch#181575)
KERNELS_OF_ITS_OWN = (2, 13)
KERNEL_HEADS = frozenset({32, 64, 72, 80, 96, 128, 256})


class QueriesInPieces(TorchFunctionMode):
    """In this context scaled dot-product attention takes so many queries at once that their scores are few enough.

    Exact: a query's output does not depend on the others. It goes for every network, whoever wrote it.

    Args:
        most: elements that batch x heads x queries x keys may be; one query is always taken.
    """

    def __init__(self, most: int = SCORES):
        super().__init__()
        self.most = most

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is not functional.scaled_dot_product_attention:
            return function(*args, **kwargs)
        return self._attend(*args, **kwargs)

    def _attend(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options) -> torch.Tensor:
        attend = functional.scaled_dot_product_attention
        queries, others = query.shape[-2], query.shape[:-2].numel() * key.shape[-2]
        piece = max(self.most // others, 1)
        if queries <= piece or is_causal:  # a causal mask counts positions from the first query; nothing here has one
            return attend(query, key, value, attn_mask, dropout_p, is_causal, **options)
        pieces = []
        for start in range(0, queries, piece):
            here = slice(start, start + piece)
            mask = attn_mask
            if mask is not None and mask.ndim > 1 and mask.shape[-2] > 1:
                mask = mask[..., here, :]
            pieces.append(attend(query[..., here, :], key, value, mask, dropout_p, False, **options))
        return torch.cat(pieces, dim=-2)


def attention_for(device: torch.device) -> QueriesInPieces:
    """The context in which a network attends on ``device``: in pieces on MPS, at once elsewhere."""
    if device.type != "mps":
        return QueriesInPieces(2**62)
    _advise()
    return QueriesInPieces()


def score_bytes(device: torch.device, heads: int, tokens: int, head_width: int, item_bytes: int) -> int:
    """Bytes of scores that attention of a sequence with itself has in memory at once, in ``attention_for(device)``.

    Where MPS writes them out they are there three times: in float32 before and after the softmax, and in the queries' type.
    That is read in PyTorch's source, not measured. Other devices write none.

    Args:
        item_bytes: of a value of the queries.
    """
    if device.type != "mps" or (head_width in KERNEL_HEADS and not is_old()):
        return 0
    return min(SCORES, heads * tokens**2) * (4 + 4 + item_bytes)


def is_old() -> bool:
    """Whether this PyTorch is older than the one whose attention on MPS writes no scores out."""
    version = torch.__version__.partition("+")[0]
    return tuple(int(part) for part in version.split(".")[:2]) < KERNELS_OF_ITS_OWN


@cache
def _advise() -> None:
    if is_old():
        logging.warning(
            "ComfyUI-LLaDA2-MLX: PyTorch %s on MPS writes all attention scores into memory. PyTorch 2.13 or later has faster "
            "kernels that do not: update it for a faster decoder that needs less memory.",
            torch.__version__.partition("+")[0],
        )
