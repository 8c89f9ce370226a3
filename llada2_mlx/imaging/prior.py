"""SigVQ, the prior: codes -> the features that the decoder is conditioned on."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..checkpoint.layout import Checkpoint
from ..errors import RequestError
from ..vq import VQGrid
from .device import build, load_module, read_state_dict

FEATURE_UPSAMPLING = 2  # the grid of features has this many times the sides of the grid of codes


class SigVQPrior(nn.Module):
    """Codes -> conditioning features: embedding, linear, SiLU, linear. Built from the shapes of its state dict."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        super().__init__()
        linear = lambda name: nn.Linear(*reversed(tensors[f"prior_projector.net.{name}.weight"].shape))
        self.prior_token_embedding = nn.Embedding(*tensors["prior_token_embedding.weight"].shape)
        self.prior_projector = nn.Module()
        self.prior_projector.net = nn.ModuleDict({"0": nn.ModuleDict({"proj": linear("0.proj")}), "2": linear("2")})

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """[..., height, width] integers -> [..., height, width, features]."""
        net = self.prior_projector.net
        return net["2"](nn.functional.silu(net["0"]["proj"](self.prior_token_embedding(codes))))


def upsampled(codes: torch.Tensor) -> torch.Tensor:
    """[..., height, width] -> [..., 2 height, 2 width]: each code four times."""
    for axis in (-2, -1):
        codes = codes.repeat_interleave(FEATURE_UPSAMPLING, dim=axis)
    return codes


def check_codebook(grid: VQGrid, codes: int, model: str) -> None:
    """Raise ``RequestError`` if a grid is of a model with another codebook."""
    if grid.codebook_size != codes:
        raise RequestError(
            f"The grid was made by a model with {grid.codebook_size} codes; the decoder of {model} knows {codes}. "
            "Choose the decoder of the model that made the grid."
        )


def prior_path(checkpoint: Checkpoint) -> Path:
    """Where a checkpoint keeps its prior."""
    return checkpoint.root / "image_tokenizer" / "sigvq_embedding.pt"


def load_prior(checkpoint: Checkpoint, device: torch.device) -> SigVQPrior:
    """The prior of a checkpoint, on a device."""
    path = prior_path(checkpoint)
    tensors = read_state_dict(path, device)
    return load_module(build(lambda: SigVQPrior(tensors), path), tensors, path)
