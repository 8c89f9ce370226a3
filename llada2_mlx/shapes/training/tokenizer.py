"""The image tokenizer: a vision transformer and a vector quantiser, trained to rebuild the picture and to name it.

Each code has to say by itself which colour and which kind of shape it is part of; a few convolutions over the codes
rebuild the pixels. Every picture is seen in two sizes: as the decoder will draw it (half of 256 pixels, 8 x 8 codes)
and as it is understood (256 pixels, 16 x 16 codes).
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import GlmImageVisionConfig, GlmImageVisionModel, GlmImageVQVAE, GlmImageVQVAEConfig

from ..world import SIDE, Colour, Kind, Scene, random_scene
from .loop import Schedule
from .pixels import drawn

CODES = 2048
CODE_WIDTH = 16
WIDTH = 128
PATCH = 16
SMALL = SIDE // 2
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_heads": 4,
    "depth": 3,
    "patch_size": PATCH,
    "image_size": SIDE,
    "in_channels": 3,
    "hidden_act": "gelu",
    "attention_bias": True,
}
QUANTISER = {"num_embeddings": CODES, "embed_dim": CODE_WIDTH, "latent_channels": WIDTH, "in_channels": 3}
CONFIGS = {"vision_config": VISION, "vq_config": QUANTISER}
SCHEDULE = Schedule(steps=2200, rate=1e-3, warmup=100)
BATCH, LARGE_BATCH = 24, 4
REBUILD_WIDTH = 64


class Tokenizer(nn.Module):
    """What the checkpoint keeps (``vision`` and ``quantiser``), and the heads that teach it."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = GlmImageVisionModel(GlmImageVisionConfig(**VISION))
        self.quantiser = GlmImageVQVAE(GlmImageVQVAEConfig(**QUANTISER))
        # each code's moving average: how often it is used, and the sum of what it stands for
        self.register_buffer("uses", torch.ones(CODES))
        self.register_buffer("sums", F.normalize(torch.randn(CODES, CODE_WIDTH), dim=-1))
        self.names = nn.Sequential(
            nn.Linear(CODE_WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 2 + len(Colour) + len(Kind))
        )
        width = REBUILD_WIDTH
        self.widen = nn.Linear(CODE_WIDTH, width)
        self.rebuild = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, width, 1))
            for _ in range(3)
        )
        self.to_pixels = nn.Linear(width, 3 * PATCH * PATCH)
        self.quantiser.quantize.embedding.weight.requires_grad_(False)
        for name, parameter in self.vision.blocks.named_parameters():
            if parameter.ndim == 2:  # the library's own start is meant for a width of thousands
                deep = name.endswith(("proj.weight", "fc2.weight"))
                nn.init.normal_(
                    parameter, std=(2 * VISION["depth"] if deep else 1) ** -0.5 * parameter.shape[1] ** -0.5
                )
        # as large as the patches are: with small random positions, no shape is recognised for a long time
        self.vision.embeddings.position_embedding.weight.data = positions(SIDE // PATCH, WIDTH)
        self._spread()

    def load_published(self, path: Path) -> Tokenizer:
        """Take what a checkpoint keeps; the heads that teach stay as they are."""
        stored = load_file(path)
        for prefix, part in (("model.visual.", self.vision), ("model.vqmodel.", self.quantiser)):
            own = {
                name.removeprefix(prefix): value.float() for name, value in stored.items() if name.startswith(prefix)
            }
            part.load_state_dict(own)
        return self.eval().requires_grad_(False)

    @torch.no_grad()
    def _spread(self) -> None:
        """Begin with features that differ: the main directions in which the untrained transformer's output varies."""
        rng = random.Random("spread")
        outputs = self._transform(drawn(random_scene(rng) for _ in range(8))).flatten(0, 1)
        mean = outputs.mean(dim=0)
        _, lengths, directions = torch.linalg.svd(outputs - mean, full_matrices=False)
        weight = directions[:CODE_WIDTH] / lengths[:CODE_WIDTH, None] * len(outputs) ** 0.5
        self.quantiser.quant_conv.weight.copy_(weight[..., None, None])
        self.quantiser.quant_conv.bias.copy_(-weight @ mean)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """[batch, 3, height, width] in -1 .. 1 -> [batch, rows, columns, CODE_WIDTH] of length 1.

        The library runs one picture after the other; a batch of one size goes through its layers at once.
        """
        x = self._transform(pixels)
        x = self.quantiser.quant_conv(rearrange(x, "b (h w) c -> b c h w", h=pixels.shape[2] // PATCH))
        return F.normalize(rearrange(x, "b c h w -> b h w c"), dim=-1)

    def _transform(self, pixels: torch.Tensor) -> torch.Tensor:
        batch, rows, columns = len(pixels), pixels.shape[2] // PATCH, pixels.shape[3] // PATCH
        patches = rearrange(pixels, "b c (h p) (w q) -> (b h w) (c p q)", p=PATCH, q=PATCH)
        x = rearrange(self.vision.patch_embed(patches), "(b n) c -> b n c", b=batch)
        x = x + self._positions(rows, columns)
        for block in self.vision.blocks:
            x = x + self._attention(block.attn, block.norm1(x))
            x = x + block.mlp(block.norm2(x))
        return x

    def _positions(self, rows: int, columns: int) -> torch.Tensor:
        down, along = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        nothing = torch.zeros(rows * columns, WIDTH)
        return self.vision.embeddings(
            nothing, [rows * columns], torch.tensor([[1, rows, columns]]), down.flatten(), along.flatten()
        )

    @staticmethod
    def _attention(attention: nn.Module, x: torch.Tensor) -> torch.Tensor:
        query, key, value = rearrange(attention.qkv(x), "b n (t h d) -> t b h n d", t=3, h=attention.num_heads)
        out = F.scaled_dot_product_attention(query, key, value)
        return attention.proj(rearrange(out, "b h n d -> b n (h d)"))

    def codes(self, features: torch.Tensor) -> torch.Tensor:
        """The nearest code of each feature, [...] integers."""
        book = F.normalize(self.quantiser.quantize.embedding.weight, dim=-1)
        return (features.detach() @ book.T).argmax(dim=-1)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """[batch, 3, height, width] in -1 .. 1 -> codes [batch, rows, columns]."""
        return self.codes(self.features(pixels))

    def book(self, width: int) -> torch.Tensor:
        """The codes' vectors turned into a wider space, [CODES, width], of variance 1.

        Codes of one colour and kind are near to each other in it. Who learns of codes and begins with it has less to
        find out, and knows something of codes that he seldom sees.
        """
        turn = torch.linalg.qr(torch.randn(width, CODE_WIDTH, generator=torch.Generator().manual_seed(width))).Q
        return F.normalize(self.quantiser.quantize.embedding.weight, dim=-1) @ turn.T * width**0.5

    def losses(self, step: int, rng: random.Random) -> dict[str, torch.Tensor]:
        """One batch of pictures in both sizes."""
        told: dict[str, torch.Tensor] = {}
        for name, batch in (("small", BATCH), ("large", LARGE_BATCH)):
            # full pictures, more than the world has: there is more to learn in them
            scenes = [random_scene(rng, rng.choice((2, 3, 4, 4, 4))) for _ in range(batch)]
            pixels = drawn(scenes)
            if name == "small":
                pixels = F.avg_pool2d(pixels, 2)
            told |= self._losses(name, _worn(pixels), pixels, *patch_names(scenes, pixels.shape[-1] // PATCH))
        told["loss"] = sum(told.values())
        told["used"] = (self.uses > 0.05).float().mean()
        return told

    def _losses(
        self, name: str, seen: torch.Tensor, pixels: torch.Tensor, colours: torch.Tensor, kinds: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        features = self.features(seen)
        codes = self.codes(features)
        quantised = F.normalize(self.quantiser.quantize.embedding.weight, dim=-1)[codes]
        commitment = F.mse_loss(features, quantised) * CODE_WIDTH
        self._learn_codes(features.detach().flatten(0, 2), codes.flatten())
        passed = features + (quantised - features).detach()  # straight through
        # what a code says, and what is said before it is rounded to a code: without the latter, kinds never get codes
        told = [self._names(vectors, colours, kinds) for vectors in (passed, features)]
        (colour, kind), (colour_before, kind_before) = told
        x = rearrange(self.widen(passed * CODE_WIDTH**0.5), "b h w c -> b c h w")
        for block in self.rebuild:
            x = x + block(x)
        built = rearrange(
            self.to_pixels(rearrange(x, "b c h w -> b h w c")), "b h w (c p q) -> b c (h p) (w q)", p=PATCH, q=PATCH
        )
        error = F.l1_loss(built, pixels) + F.mse_loss(built, pixels)
        return {
            f"pixels {name}": 3 * error,
            f"colour {name}": 0.3 * (colour + colour_before),
            f"kind {name}": kind,
            f"kind before {name}": kind_before,
            f"commitment {name}": 0.25 * commitment,
        }

    def _names(
        self, vectors: torch.Tensor, colours: torch.Tensor, kinds: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy of the colour and of the kind that vectors tell."""
        by_colour, by_kind = (
            self.names(vectors * CODE_WIDTH**0.5).flatten(0, 2).split([1 + len(Colour), 1 + len(Kind)], dim=-1)
        )
        return F.cross_entropy(by_colour, colours.flatten()), F.cross_entropy(by_kind, kinds.flatten())

    @torch.no_grad()
    def _learn_codes(self, features: torch.Tensor, codes: torch.Tensor) -> None:
        """Moving averages in place of gradients; a code that nothing uses becomes a feature of this batch."""
        if not self.training:
            return
        self.uses.mul_(0.98).index_add_(0, codes, torch.full((len(codes),), 0.02))
        self.sums.mul_(0.98).index_add_(0, codes, features * 0.02)
        dead = (self.uses < 0.01).nonzero().flatten()
        if len(dead):
            chosen = torch.randint(len(features), (len(dead),))
            self.sums[dead] = features[chosen]
            self.uses[dead] = 0.1
            self.sums[dead] *= 0.1
        self.quantiser.quantize.embedding.weight.copy_(F.normalize(self.sums, dim=-1))


def positions(side: int, width: int) -> torch.Tensor:
    """Sines and cosines of row and column, [side * side, width], of variance 1."""
    angles = torch.arange(side)[:, None] * math.pi * 0.5 ** torch.linspace(0, 5, width // 4)
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
    rows, columns = waves[:, None].expand(side, side, -1), waves[None].expand(side, side, -1)
    return 2**0.5 * torch.cat([rows, columns], dim=-1).flatten(0, 1)


def patch_names(scenes: list[Scene], side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The colour and the kind of the shape that each patch lies in, [batch, side, side]; 0 for the background.

    A patch belongs to a shape whose middle is nearer than its radius and a third of a patch.
    """
    colours, kinds = (torch.zeros(len(scenes), side, side, dtype=torch.long) for _ in range(2))
    centres = (torch.arange(side) + 0.5) * SIDE / side
    for index, scene in enumerate(scenes):
        for shape in scene.shapes:
            x, y = shape.place.centre[0] + shape.variation.x, shape.place.centre[1] + shape.variation.y
            near = torch.hypot(centres[None] - x, centres[:, None] - y) < shape.size.radius + SIDE / side / 3
            colours[index][near] = 1 + list(Colour).index(shape.colour)
            kinds[index][near] = 1 + list(Kind).index(shape.kind)
    return colours, kinds


def _worn(pixels: torch.Tensor) -> torch.Tensor:
    """Half of the pictures a little blurred and noisy, as pictures are that a decoder drew."""
    fresh, worn = pixels.chunk(2)
    blurred = F.avg_pool2d(worn, 3, stride=1, padding=1, count_include_pad=False)
    share = (torch.rand(len(worn), 1, 1, 1) - 0.3).clamp_min(0)
    noise = (torch.rand_like(worn) - 0.5) * torch.rand(len(worn), 1, 1, 1) * 0.2
    return torch.cat([fresh, (worn.lerp(blurred, share) + noise).clamp(-1, 1)])
