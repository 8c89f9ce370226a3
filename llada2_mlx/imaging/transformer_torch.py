"""The decoder's transformer in PyTorch: diffusers' Z-Image transformer, unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import nn

from ..checkpoint.layout import Checkpoint, Part
from ..errors import CheckpointError
from ..progress import OnStep, ignore
from ..vq import VQGrid
from .attention import attention_for, score_bytes
from .decoder import EMBEDDER, LatentDecoder, decoder_folder, stored
from .device import build, default_device, load_module, read_config, read_tensors, synchronize
from .flow import DecodeOptions, Tell
from .prior import FEATURE_UPSAMPLING
from .step_cache import StepCache

# What there is of a token at once, in units of the network's width: see ``Decoder.working_bytes``
FEED_FORWARD_UNITS, ATTENTION_UNITS = 16, 7


class Decoder(LatentDecoder):
    """A decoder whose transformer is diffusers' and runs in PyTorch.

    Args:
        checkpoint: the model folder.
        part: ``Part.DECODER`` or ``Part.DECODER_TURBO``.
        device: where to run; the library's choice if None.
        on_step: called as the weights are read; what it raises ends the work.

    Raises:
        CheckpointError: the part is missing, damaged, or does not fit its config.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        part: Part = Part.DECODER,
        device: torch.device | None = None,
        on_step: OnStep = ignore,
    ):
        from diffusers import ZImageTransformer2DModel

        super().__init__(checkpoint, part, device or default_device())
        folder = decoder_folder(part)
        path = checkpoint.only_safetensors(folder)
        # the published config states another width, and axes that are too short
        config = read_config(checkpoint, folder) | {
            "cap_feat_dim": self.feature_width,
            "axes_lens": [32768, 1024, 1024],
        }
        if "quantization" in config:
            raise CheckpointError(
                f"The decoder in {checkpoint.root / folder} has few bits, which only MLX runs. Choose the engine auto or mlx, or the "
                "model that it was made of."
            )
        transformer = build(lambda: ZImageTransformer2DModel(**config), checkpoint.root / folder / "config.json")
        tensors = read_tensors(path, self.device, on_step=on_step)
        own = {name.replace("semantic_embedder", "cap_embedder"): tensor for name, tensor in tensors.items()}
        self.transformer = load_module(transformer, own, path)
        self.channels = self.transformer.in_channels
        self._context = _ContextRefiner(self.transformer.context_refiner)
        self.transformer.context_refiner = nn.ModuleList([self._context])

    def velocity(self, condition: torch.Tensor, cache: StepCache | None = None) -> BranchVelocity:
        """The velocity under a condition, features [tokens, features], for ``flow.solve``."""
        return BranchVelocity(self.transformer, self._context, condition.to(self.transformer.dtype), cache)

    @staticmethod
    def working_bytes(
        checkpoint: Checkpoint, part: Part, grids: Sequence[VQGrid], options: DecodeOptions, device: torch.device
    ) -> int:
        """What ``sample`` takes in memory beside the weights, from the headers of the files: nothing is loaded.

        Fitted to what ``python -m benchmarks.memory`` (in ``tests/``) counts at the published width for pictures of 512 to
        2048 pixels: the live tensors of whole calls, without what a kernel takes for itself. The most is within a layer, in
        its feed-forward part (15.7 values a token and unit of width at most), or in its attention (6.8) where that writes
        scores out. Kept all the while are the features of all pictures, those of the other branch, and both refined, and what
        a step cache remembers.

        Raises:
            CheckpointError: the weights are missing or damaged, or of another network.
        """
        path = checkpoint.only_safetensors(decoder_folder(part))
        embedder, norm = stored(path, EMBEDDER, "layers.0.attention.norm_q.weight")
        head = norm.shape[0]
        (width, features), size = embedder.shape, 4 if embedder.dtype == "F32" else 2
        codes, branches = grids[0].height * grids[0].width, 2 if options.guidance else 1
        condition = codes * FEATURE_UPSAMPLING**2
        tokens = condition + codes * options.upscale**2  # a token of the picture is 16 x 16 pixels
        layer = tokens * width * size
        scores = score_bytes(device, width // head, tokens, head, size)
        kept = condition * size * ((len(grids) + branches - 1) * features + branches * width)
        if options.cache_threshold:
            kept += (2 * branches + 1) * layer  # what the first layer and the others added, and what they add to
        return max(FEED_FORWARD_UNITS * layer, ATTENTION_UNITS * layer + scores if scores else 0) + kept


class BranchVelocity:
    """diffusers' transformer under one condition: ``(time, latent) -> velocity``, see ``flow.Velocity``.

    The context refiner sees neither time nor latent, so what it gives is computed in the first call and kept.

    Args:
        cache: of the main layers but the first; the last layer, which sees the time too, runs in every call.
    """

    def __init__(
        self,
        transformer: nn.Module,
        context: _ContextRefiner,
        condition: torch.Tensor,
        cache: StepCache | None = None,
    ):
        self._transformer, self._refiner, self._condition = transformer, context, condition
        self._refined: torch.Tensor | None = None
        self._layers = [*transformer.noise_refiner, *transformer.layers]
        self._cached = _CachedLayers(transformer.layers, cache) if cache and len(transformer.layers) > 1 else None
        self.pieces = len(self._layers)

    @torch.no_grad()
    def __call__(self, time: torch.Tensor | float, latent: torch.Tensor, tell: Tell) -> torch.Tensor:
        device, dtype = self._condition.device, self._condition.dtype
        times = torch.as_tensor(time, dtype=torch.float32, device=device).reshape(1)

        def told(*_: object) -> None:
            synchronize(device)  # else a layer is over before the device has begun with it
            tell()

        with ExitStack() as stack:
            stack.enter_context(attention_for(device))
            for layer in self._layers:
                stack.callback(layer.register_forward_hook(told).remove)
            if self._cached:
                stack.callback(setattr, self._transformer, "layers", self._transformer.layers)
                self._transformer.layers, self._cached.tell = nn.ModuleList([self._cached]), tell
            self._refiner.output = self._refined
            stack.callback(setattr, self._refiner, "output", None)
            predicted = self._transformer([latent.to(dtype)], times, [self._condition], return_dict=False)[0][0]
            self._refined = self._refiner.output
        return predicted.to(torch.float32)


class _CachedLayers(nn.Module):
    """Main layers as one, behind a step cache; tells of those that it saves."""

    def __init__(self, layers: nn.ModuleList, cache: StepCache):
        super().__init__()
        self.layers, self.cache = layers, cache
        self.tell: Tell = lambda pieces=1: None

    def forward(self, features: torch.Tensor, *where: torch.Tensor | None) -> torch.Tensor:
        first, *others = self.layers

        def rest(features: torch.Tensor) -> torch.Tensor:
            for layer in others:
                features = layer(features, *where)
            return features

        skipped = self.cache.skipped
        result = self.cache(features, first(features, *where), rest)
        if self.cache.skipped > skipped:
            self.tell(len(others))
        return result


class _ContextRefiner(nn.Module):
    """The layers of a context refiner as one; where their output is known it is taken."""

    def __init__(self, layers: nn.ModuleList):
        super().__init__()
        self.layers = layers
        self.output: torch.Tensor | None = None

    def forward(self, features: torch.Tensor, *where: torch.Tensor) -> torch.Tensor:
        if self.output is None:
            for layer in self.layers:
                features = layer(features, *where)
            self.output = features
        return self.output
