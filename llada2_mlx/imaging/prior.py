"""SigVQ, the prior: codes -> the features that the decoder is conditioned on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ..checkpoint.layout import Checkpoint, Part
from ..errors import LLaDA2Error, RequestError
from ..vq import VQGrid
from .device import build, default_device, load_module, read_state_dict

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


class Prior:
    """The prior of a checkpoint, without a decoder: grids of codes -> conditioning features.

    Args:
        device: where to run; the library's choice if None.

    Raises:
        CheckpointError: its file is missing or damaged.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device | None = None):
        checkpoint.require(Part.PRIOR)
        self.name, self.module = checkpoint.root.name, load_prior(checkpoint, device or default_device())

    def features(self, grid: VQGrid) -> torch.Tensor:
        """As ``conditioning``."""
        return conditioning(self.module, grid, self.name)


@torch.no_grad()
def conditioning(prior: SigVQPrior, grid: VQGrid, model: str) -> torch.Tensor:
    """Features [4 height width, features] of a grid, row by row of the upsampled grid, in the prior's own type.

    Args:
        model: what the prior's model is called, for a person.

    Raises:
        RequestError: the grid is of a model with another codebook.
        LLaDA2Error: the features are not finite.
    """
    table = prior.prior_token_embedding
    check_codebook(grid, table.num_embeddings, model)
    codes = torch.from_numpy(grid.codes.astype("int64")).to(table.weight.device)
    features = prior(upsampled(codes)).flatten(0, 1)
    if not torch.isfinite(features).all():
        raise LLaDA2Error(
            "The SigVQ prior gave values that are not finite (NaN or infinity), so there is no picture. Download "
            "image_tokenizer/sigvq_embedding.pt again."
        )
    return features


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


def check_conditioning(checkpoint: Checkpoint, upscale: int, grids: Sequence[VQGrid] = ()) -> None:
    """Say what would go wrong in conditioning a decoder on codes, as far as it can be known without reading weights.

    Args:
        grids: what is to be decoded, once it is there.

    Raises:
        RequestError: a grid is of a model with another codebook, or the decoders cannot enlarge by ``upscale``.
        CheckpointError: the prior is missing or damaged.
    """
    checkpoint.require(Part.PRIOR)
    checkpoint.image_sizes.require_upscale(upscale)
    if not grids:
        return
    codes = read_state_dict(prior_path(checkpoint)).get("prior_token_embedding.weight", torch.empty(0)).shape[0]
    for grid in grids:
        check_codebook(grid, codes, checkpoint.root.name)


def prior_path(checkpoint: Checkpoint) -> Path:
    """Where a checkpoint keeps its prior."""
    return checkpoint.root / "image_tokenizer" / "sigvq_embedding.pt"


def load_prior(checkpoint: Checkpoint, device: torch.device) -> SigVQPrior:
    """The prior of a checkpoint, on a device."""
    path = prior_path(checkpoint)
    tensors = read_state_dict(path, device)
    return load_module(build(lambda: SigVQPrior(tensors), path), tensors, path)
