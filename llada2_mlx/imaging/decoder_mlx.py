"""A decoder whose transformer runs in MLX, on a thread of its own: its weights, and the velocity that it gives."""

from __future__ import annotations

import gc
from collections.abc import Generator, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from mlx.utils import tree_flatten

from ..checkpoint.hub import again
from ..checkpoint.layout import Checkpoint, Part
from ..errors import CheckpointError
from ..progress import OnStep, Progress, ignore
from ..vq import VQGrid
from ..worker import MLXWorker, wired_limit
from .decoder import LatentDecoder, decoder_folder
from .decoder_copy import CACHE, block_of, check, convert_decoder, own_copy, run_type
from .flow import DecodeOptions, OnLatent, Tell
from .step_cache import StepCache
from .transformer_mlx import Context, Norms, ZImageTransformer


class MLXStepCache(StepCache):
    """A step cache of MLX's arrays."""

    def kept(self, features: mx.array) -> mx.array:
        """Evaluated, or what it was computed from would be kept too."""
        mx.eval(features)
        return features

    def size(self, features: mx.array) -> mx.array:
        """The mean in float32: millions of values are summed."""
        return super().size(features.astype(mx.float32))


class MLXDecoder(LatentDecoder):
    """A decoder whose transformer runs in MLX: in bf16, or in float32 where it is stored so or MLX runs on a CPU.

    The prior and the arithmetic of the sampler run in PyTorch, on the CPU.

    Args:
        checkpoint: the model folder.
        part: ``Part.DECODER`` or ``Part.DECODER_TURBO``.
        on_step: called as the weights are read; what it raises ends the work.
        quantised: run from the copy with 8 bits, which is made unless it is there. A decoder that is stored with 8 bits
            runs with them in any case.

    Raises:
        CheckpointError: the part is missing, damaged, or does not fit its config.
        RequestError, LLaDA2Error: the copy cannot be made, see ``convert_decoder``.
    """

    new_cache = MLXStepCache

    def __init__(
        self, checkpoint: Checkpoint, part: Part = Part.DECODER, on_step: OnStep = ignore, quantised: bool = False
    ):
        super().__init__(checkpoint, part, torch.device("cpu"))
        self._worker = MLXWorker()
        self.transformer = self._worker.drive(self._read(checkpoint.root / decoder_folder(part), quantised), on_step)
        self.channels = self.transformer.config.in_channels
        self._times: tuple[float, tuple[mx.array, list[Norms]]] | None = None

    def velocity(self, condition: torch.Tensor, cache: StepCache | None = None) -> MLXVelocity:
        """The velocity under a condition, features [tokens, features], for ``flow.solve``."""
        return MLXVelocity(self, condition, cache)

    def sample(
        self,
        grids: Sequence[VQGrid],
        options: DecodeOptions,
        on_step: OnStep = ignore,
        on_latent: OnLatent | None = None,
    ) -> torch.Tensor:
        """As ``LatentDecoder.sample``; the weights are kept in memory meanwhile, see ``worker.wired_limit``."""
        with wired_limit(self.size, self._worker.call):
            return super().sample(grids, options, on_step, on_latent)

    def unload(self) -> None:
        """Let the weights go; nothing can be decoded afterwards."""
        self.transformer = self._times = None
        gc.collect()  # a solver leaves what it called in circles, and with it what was computed for a picture
        self._worker.call(mx.clear_cache)

    def times(self, time: float) -> tuple[mx.array, list[Norms]]:
        """What a time makes of the transformer, computed once for both branches; to be called on the worker's thread."""
        if self._times is None or self._times[0] != time:
            self._times = time, self.transformer.times(time)
        return self._times[1]

    def drive(self, steps: Generator[Progress, None, np.ndarray], tell: Tell) -> np.ndarray:
        """Run a generator on the thread that the transformer lives on; ``tell()`` is called in this one."""
        return self._worker.drive(steps, lambda _: tell(), cache=CACHE)

    def _read(self, folder: Path, quantised: bool) -> Generator[Progress, None, ZImageTransformer]:
        if quantised and block_of(folder) is None:
            folder = yield from convert_decoder(folder, own_copy(folder))
        transformer, header = check(folder)
        path, self.size = next(iter(header.values())).file, 0
        dtype, tensors = run_type(header["x_pad_token"].dtype), mx.load(str(path))
        parameters = [name for name, _ in tree_flatten(transformer.parameters())]
        for done, name in enumerate(parameters, 1):
            value = tensors.pop(name)
            value = value if value.dtype == mx.uint32 else value.astype(dtype)
            finite = mx.isfinite(value).all()
            mx.eval(value, finite)
            if not finite.item():
                raise CheckpointError(
                    f"{path} holds values that are not finite (NaN or infinity) in {name}. {again(path)}"
                )
            transformer.load_weights([(name, value)], strict=False)
            self.size += value.nbytes
            yield Progress("loading weights", done, len(parameters))
        return transformer


class MLXVelocity:
    """The velocity under one condition: ``(time, latent) -> velocity``, see ``flow.Velocity``.

    The refined condition and the rotations are computed in the first call and kept.
    """

    def __init__(self, decoder: MLXDecoder, condition: torch.Tensor, cache: StepCache | None = None):
        self._decoder, self._condition, self._cache = decoder, condition, cache
        self._context: Context | None = None
        self.pieces = len(decoder.transformer.timed_layers)

    def __call__(self, time: torch.Tensor | float, latent: torch.Tensor, tell: Tell) -> torch.Tensor:
        given = latent.squeeze(1).to(torch.float32).numpy()
        return torch.from_numpy(self._decoder.drive(self._steps(float(time), given), tell)).unsqueeze(1)

    def _steps(self, time: float, latent: np.ndarray) -> Generator[Progress, None, np.ndarray]:
        transformer = self._decoder.transformer
        if self._context is None:
            self._context = transformer.context(self._features(), latent.shape[1:])
        steps = transformer.velocity(mx.array(latent), self._context, *self._decoder.times(time), self._cache)
        for done in range(1, self.pieces + 1):
            next(steps)
            yield Progress("decoding", done, self.pieces)
        try:
            next(steps)
        except StopIteration as stop:
            return np.array(stop.value)

    def _features(self) -> mx.array:
        """The condition, in the type that the transformer runs in."""
        features = mx.array(self._condition.to(torch.float32).numpy())
        features = features.astype(self._decoder.transformer.x_pad_token.dtype)
        mx.eval(features)
        return features
