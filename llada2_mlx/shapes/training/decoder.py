"""The decoder: a small Z-Image transformer and the SigVQ prior, trained by flow matching on the VAE's latents.

The features of a picture reach the transformer as a plain sequence, so it has to find out by itself which of them
belongs to which patch. That is the hardest thing it learns, and no gradient says so directly. Hence a first stage on
random codes, and in both stages one more loss: in two layers the first heads of each patch are told where to look, at its own
code and at those beside it.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence

import torch
from diffusers import ZImageTransformer2DModel
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from ...imaging.flow import DecodeOptions, ode_times, shifted
from ...imaging.prior import FEATURE_UPSAMPLING, SigVQPrior, upsampled
from .loop import Schedule
from .tokenizer import CODES

FEATURES, WIDTH, HEADS = 64, 128, 4
CONFIG = {
    "dim": WIDTH,
    "n_heads": HEADS,
    "n_kv_heads": HEADS,
    "n_layers": 4,
    "n_refiner_layers": 0,
    "axes_dims": [16, 8, 8],
    "axes_lens": [2048, 64, 64],
    "in_channels": 16,
}
SIDE = 8  # codes
PATCHES = (FEATURE_UPSAMPLING * SIDE) ** 2  # of two by two latents; there are as many features
# layer -> where its first heads are told to look, in codes down and along from a patch's own
LOOKS = {1: ((0, 0), (0, -1), (0, 1)), 2: ((0, 0), (-1, 0), (1, 0))}
SHIFT = DecodeOptions().time_shift
DROPPED = 0.1  # share of pictures whose features are dropped, for guidance
POSITIONS = Schedule(steps=400, rate=2e-3, warmup=50)
PICTURES = Schedule(steps=4000, rate=1.5e-3, warmup=50, average=0.997)
TURBO = Schedule(steps=200, rate=3e-4, warmup=20, average=0.98)
TURBO_STEPS = 8
BATCH = 8


class FlowDecoder(nn.Module):
    """What the checkpoint keeps: ``prior`` and ``transformer``."""

    def __init__(self) -> None:
        super().__init__()
        self.prior = SigVQPrior(
            {
                "prior_token_embedding.weight": torch.empty(CODES, FEATURES),
                "prior_projector.net.0.proj.weight": torch.empty(FEATURES, FEATURES),
                "prior_projector.net.2.weight": torch.empty(FEATURES, FEATURES),
            }
        )
        self.transformer = ZImageTransformer2DModel(**CONFIG, cap_feat_dim=FEATURES)
        self.looks = [_Look(offsets) for offsets in LOOKS.values()]
        for layer, look in zip(LOOKS, self.looks, strict=True):
            self.transformer.layers[layer].attention.set_processor(look)

    @torch.no_grad()
    def begin_with(self, book: torch.Tensor) -> None:
        """Let the prior's embeddings begin with what the tokenizer knows of the codes."""
        self.prior.prior_token_embedding.weight.copy_(book)

    def velocity(self, latents: torch.Tensor, times: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """[batch, 16, height, width], [batch], [batch, patches, FEATURES] -> the predicted velocity."""
        out = self.transformer(list(latents.unsqueeze(2)), times, list(features), return_dict=False)[0]
        return torch.stack(out).squeeze(2)

    def features(self, codes: torch.Tensor) -> torch.Tensor:
        """[batch, rows, columns] codes -> [batch, patches, FEATURES]."""
        return self.prior(upsampled(codes)).flatten(1, 2)

    def losses(self, codes: torch.Tensor, latents: torch.Tensor, looking: float) -> dict[str, torch.Tensor]:
        """Flow matching: the velocity from noise to ``latents`` at a time that decoding would ask about."""
        batch = len(latents)
        features = self.features(codes)
        kept = torch.rand(batch) >= DROPPED
        features = features * kept[:, None, None]
        noise = torch.randn_like(latents)
        times = shifted(torch.rand(batch), SHIFT)
        t = times[:, None, None, None]
        predicted = self.velocity(t * latents + (1 - t) * noise, times, features)
        flow = F.mse_loss(predicted, latents - noise)
        look = sum(look.loss[kept].mean() for look in self.looks) / len(self.looks)
        return {"loss": flow + looking * look, "flow": flow, "look": look}

    def position_losses(self, step: int, rng: random.Random) -> dict[str, torch.Tensor]:
        """Random codes; each has latents of its own, the same wherever it stands."""
        table = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
        codes = torch.randint(CODES, (BATCH, SIDE, SIDE))
        latents = rearrange(table[upsampled(codes) % 256], "b h w (p q c) -> b c (h p) (w q)", p=2, q=2)
        return self.losses(codes, latents, looking=0.5)


class Turbo(nn.Module):
    """A student that goes in one step of the short time grid where its teacher goes in two of a grid twice as fine."""

    def __init__(self, teacher: FlowDecoder) -> None:
        super().__init__()
        for look in teacher.looks:
            look.loss = torch.zeros(())  # a graph cannot be copied
        self.student = copy.deepcopy(teacher).requires_grad_(True)
        self.student.prior.requires_grad_(False)  # there is one for both decoders
        self._teacher = [teacher]  # a list, so that it is no part of this module

    def losses(self, codes: torch.Tensor, latents: torch.Tensor):
        """The losses of a batch drawn from prepared pictures, for ``loop.train``."""
        grid = ode_times(2 * TURBO_STEPS - 1, SHIFT, torch.device("cpu"))

        def of(step: int, rng: random.Random) -> dict[str, torch.Tensor]:
            chosen = [rng.randrange(len(codes)) for _ in range(BATCH)]
            picture, (teacher,) = latents[chosen].float(), self._teacher
            start = 2 * torch.randint(TURBO_STEPS - 1, (BATCH,))
            begin, middle, end = (grid[start + offset] for offset in range(3))
            wide = lambda time: time[:, None, None, None]
            x = wide(begin) * picture + (1 - wide(begin)) * torch.randn_like(picture)
            with torch.no_grad():
                features = teacher.features(codes[chosen].long()) * (torch.rand(BATCH) >= DROPPED)[:, None, None]
                first = teacher.velocity(x, begin, features)
                halfway = x + wide(middle - begin) * first
                second = teacher.velocity(halfway, middle, features)
                target = (wide(middle - begin) * first + wide(end - middle) * second) / wide(end - begin)
            loss = F.mse_loss(self.student.velocity(x, begin, features), target)
            return {"loss": loss}

        return of


class _Look:
    """Z-Image's attention, which also says how far its first heads are from looking where they should.

    Args:
        offsets: for each of these heads, rows and columns of codes from a patch's own; the nearest beyond an edge.
    """

    def __init__(self, offsets: Sequence[tuple[int, int]]) -> None:
        patch, side = torch.arange(PATCHES), FEATURE_UPSAMPLING * SIDE
        row, column = patch // side // FEATURE_UPSAMPLING, patch % side // FEATURE_UPSAMPLING
        code = row * SIDE + column
        wanted = torch.stack(
            [(row + down).clamp(0, SIDE - 1) * SIDE + (column + along).clamp(0, SIDE - 1) for down, along in offsets]
        )
        self.elsewhere = wanted[:, :, None] != code  # the features of one code are equal: any of them will do
        self.loss = torch.zeros(())

    def __call__(
        self, attention: nn.Module, x: torch.Tensor, freqs_cis: torch.Tensor, **_: torch.Tensor | None
    ) -> torch.Tensor:
        split = lambda tensor: rearrange(tensor, "b n (h d) -> b n h d", h=attention.heads)
        query, key = attention.norm_q(split(attention.to_q(x))), attention.norm_k(split(attention.to_k(x)))
        query, key = (_rotate(tensor, freqs_cis).transpose(1, 2) for tensor in (query, key))
        value = split(attention.to_v(x)).transpose(1, 2)
        told = len(self.elsewhere)
        scores = query[:, :told, :PATCHES] @ key[:, :told, PATCHES:].transpose(-1, -2) * query.shape[-1] ** -0.5
        right = scores.log_softmax(dim=-1).masked_fill(self.elsewhere, -torch.inf).logsumexp(dim=-1)
        self.loss = -right.mean(dim=(-2, -1))
        out = F.scaled_dot_product_attention(query, key, value)
        return attention.to_out[0](rearrange(out, "b h n d -> b n (h d)"))


def _rotate(x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * freqs_cis.unsqueeze(2)).flatten(3)


def picture_losses(decoder: FlowDecoder, codes: torch.Tensor, latents: torch.Tensor):
    """The losses of a batch drawn from prepared pictures, for ``loop.train``."""

    def losses(step: int, rng: random.Random) -> dict[str, torch.Tensor]:
        chosen: Sequence[int] = [rng.randrange(len(codes)) for _ in range(BATCH)]
        return decoder.losses(codes[chosen].long(), latents[chosen].float(), looking=0.1)

    return losses
