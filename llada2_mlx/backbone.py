"""A backbone that can be used from any thread: one checkpoint, its tokenizer, and a worker for MLX.

Everything that touches an array, loading included, runs on the worker's thread, step by step; the caller waits
for each step and gets its progress in the thread that it called from, where it may raise to end the work.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from functools import cached_property
from typing import Any, TypeVar

import mlx.core as mx

from .checkpoint import Checkpoint, Part
from .errors import RequestError
from .model import LLaDA2
from .progress import OnStep, Progress, ignore
from .tokens import Tokens
from .weights import PRECISIONS, check_backbone, compute_type, load_backbone, memory_bytes
from .worker import MLXWorker

T = TypeVar("T")
Steps = Generator[Progress, None, T]


class Backbone:
    """A handle on the language model of a checkpoint. Its weights are read on first use, or by ``load``.

    Args:
        checkpoint: the model folder.
        precision: "bf16", "float32", or "auto": as stored (float16 as bf16), and float32 where MLX runs on the CPU.

    Raises:
        CheckpointError: config, tokenizer or weight files are missing or do not fit each other. The check reads
            headers only.
    """

    def __init__(self, checkpoint: Checkpoint, precision: str = "auto"):
        if precision not in ("auto", *PRECISIONS):
            raise RequestError(f"The precision is {precision!r}; it has to be one of auto, {', '.join(PRECISIONS)}.")
        self.checkpoint = checkpoint.require(Part.BACKBONE)
        self.config = checkpoint.config
        self._worker = MLXWorker()
        self._model: LLaDA2 | None = None
        self._loading = threading.Lock()
        tensors = checkpoint.backbone_tensors()
        self._worker.call(check_backbone, self.config, tensors, checkpoint)
        self.dtype = self._worker.call(compute_type, precision, tensors)
        self.size = self._worker.call(memory_bytes, tensors, self.dtype)

    @cached_property
    def tokens(self) -> Tokens:
        """The text tokenizer."""
        return Tokens(self.checkpoint)

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory. ``size`` is how many bytes they take then."""
        return self._model is not None

    def load(self, on_step: OnStep = ignore) -> LLaDA2:
        """The network, its weights read unless they are there.

        Raises:
            CheckpointError: a tensor holds values that are not finite, or a file is damaged.
        """
        with self._loading:
            if self._model is None:
                self._model = self._drive(load_backbone(self.checkpoint, self.dtype), on_step)
            return self._model

    def unload(self) -> None:
        """Let the weights go. They are read again on the next use."""
        self._model = None
        self._worker.call(mx.clear_cache)

    def run(self, job: Callable[..., Steps[T]], *args: Any, on_step: OnStep = ignore, **options: Any) -> T:
        """``job(network, *args, **options)``, step by step, with the weights loaded.

        Args:
            job: makes a generator of ``Progress`` whose return value is the result.
            on_step: called after each step in this thread; what it raises ends the job before the next one.
            options: of the job.
        """
        network = self.load(on_step)
        try:
            return self._drive(job(network, *args, **options), on_step)
        finally:
            self._worker.call(mx.clear_cache)  # what a run leaves in the buffer cache is memory that others miss

    def _drive(self, steps: Steps[T], on_step: OnStep) -> T:
        def advance() -> tuple[Progress | None, T | None]:
            try:
                return next(steps), None
            except StopIteration as stop:
                return None, stop.value

        try:
            while True:
                progress, result = self._worker.call(advance)
                if progress is None:
                    return result
                on_step(progress)
        finally:
            self._worker.call(steps.close)
