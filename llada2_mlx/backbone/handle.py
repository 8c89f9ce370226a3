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

from ..checkpoint.config import PRECISIONS
from ..checkpoint.hub import again
from ..checkpoint.layout import INDEX, Checkpoint, Part
from ..errors import CheckpointError, RequestError
from ..progress import OnStep, Progress, ignore
from ..tokens import Tokens
from ..worker import MLXWorker
from .convert import convert, is_current, only_copies, own_copy
from .network import LLaDA2
from .precision import (
    BITS,
    check_block,
    choose,
    choose_of,
    machine_bytes,
    memory_bytes,
    precision_bytes,
    run_type,
    scheme,
)
from .weights import check_backbone, load_backbone, stored_type
from .working import Batch, batch_bytes, fit

T = TypeVar("T")
Steps = Generator[Progress, None, T]


class Backbone:
    """A handle on the language model of a checkpoint. Its weights are read on first use, or by ``load``.

    Args:
        checkpoint: the model folder.
        precision: one of ``PRECISIONS``. "bf16" and "float32" are types to run in; "8bit", "6bit" and "4bit" run from
            a converted copy, which is made on first use (see ``convert``); "auto" is the most exact that fits into
            this machine, and for a quantised model what it is quantised to. Where only smaller copies of the weights are
            here, one of them is taken.

    ``precision`` is then what was picked, ``reason`` why if it was "auto", ``size`` how many bytes the weights take, ``working``
    how it works in the memory that is left.

    Raises:
        CheckpointError: config, tokenizer or weight files are missing or do not fit each other. The check reads
            headers only.
        RequestError: there is no such precision, or a quantised model is asked for another one.
    """

    def __init__(self, checkpoint: Checkpoint, precision: str = "auto"):
        if precision not in PRECISIONS:
            raise RequestError(f"The precision is {precision!r}; it has to be one of {', '.join(PRECISIONS)}.")
        self.checkpoint = checkpoint.require(Part.BACKBONE)
        self.config = checkpoint.config
        self._worker = MLXWorker()
        self._model: LLaDA2 | None = None
        self._loading = threading.Lock()
        self._worker.call(self._choose, precision)

    def _choose(self, precision: str) -> None:
        """Check the checkpoint, and settle how it will run."""
        if self.checkpoint.is_copy_alone:
            self._choose_copy(precision)
        else:
            self._choose_whole(precision)
        self.working = fit(self.config, self.dtype, machine_bytes() - self.size)

    def _choose_whole(self, precision: str) -> None:
        """Settle how a model will run whose own weights are here."""
        block, self.reason, tensors = self.checkpoint.quantization, None, self.checkpoint.backbone_tensors()
        if block is not None:
            block = check_block(block, f"{self.checkpoint.root / 'config.json'}")
        check_backbone(self.config, block, tensors, self.checkpoint)
        stored = f"{block['bits']}bit" if block else stored_type(tensors)
        if block and precision not in ("auto", stored):
            raise RequestError(
                f"{self.checkpoint.root} is quantised to {block['bits']} bits, and the lost precision cannot be restored. "
                f"Choose auto, or the model that it was made of."
            )
        if block:
            precision = stored
        elif precision == "auto":
            precision, self.reason = choose(self.config, stored, machine_bytes())
        self.precision, self.dtype = precision, run_type(precision)
        self._block = block or (scheme(self.config, BITS[precision]) if precision in BITS else None)
        self.size = memory_bytes(self.config, self.dtype, self._block)

    def _choose_copy(self, precision: str) -> None:
        """Settle how a model will run whose own weights are not here, but one or several smaller copies."""
        copies = self.checkpoint.copies()
        there = {f"{bits}bit": bits for bits, copy in copies.items() if is_current(copy.root, self.checkpoint, bits)}
        if not there:
            raise CheckpointError(
                f"The smaller copies in {self.checkpoint.root} are of another model or state of it. "
                f"{again(self.checkpoint.root / INDEX)}"
            )
        if precision not in ("auto", *there):
            raise RequestError(only_copies(self.checkpoint, precision))
        self.reason = None
        if precision == "auto":
            precision, why = choose_of(self.config, [*there], machine_bytes())
            self.reason = f"{why} Only smaller copies of the model are on this machine: {' and '.join(there)}."
        self.precision, self.dtype, self.size = precision, run_type(precision), precision_bytes(self.config, precision)
        self._block = scheme(self.config, BITS[precision])
        copy = copies[there[precision]]
        check_backbone(self.config, self._block, copy.backbone_tensors(), copy)

    @cached_property
    def tokens(self) -> Tokens:
        """The text tokenizer."""
        return Tokens(self.checkpoint)

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._model is not None

    def load(self, on_step: OnStep = ignore) -> LLaDA2:
        """The network, its weights read unless they are there.

        Raises:
            CheckpointError: a tensor holds values that are not finite, or a file is damaged.
            RequestError, LLaDA2Error: a converted copy is needed and cannot be made, see ``convert``.
        """
        with self._loading:
            if self._model is None:
                self._model = self._worker.drive(self._read(), on_step, cache=self.working.cache)
                self._model.prefill = self.working.piece
            return self._model

    def unload(self) -> None:
        """Let the weights go. They are read again on the next use."""
        self._model = None
        self._worker.call(mx.clear_cache)

    def work_bytes(self, batch: Batch | None = None) -> int:
        """Bytes that work takes beside the weights at most, for what fits the model's context; more for a batch."""
        return self.working.size + (batch_bytes(self.config, self.dtype, batch) if batch else 0)

    def run(
        self,
        job: Callable[..., Steps[T]],
        *args: Any,
        on_step: OnStep = ignore,
        batch: Batch | None = None,
        **options: Any,
    ) -> T:
        """``job(network, *args, **options)``, step by step, with the weights loaded.

        Args:
            job: makes a generator of ``Progress`` whose return value is the result.
            on_step: called after each step in this thread; what it raises ends the job before the next one.
            batch: what is drawn together, if several pictures are.
            options: of the job.

        Raises:
            LLaDA2Error: as ``load``, and what the job raises.
        """
        network = self.load(on_step)
        wired = self.size + self.work_bytes(batch)
        return self._worker.drive(job(network, *args, **options), on_step, wired, self.working.cache)

    def _read(self) -> Steps[LLaDA2]:
        """The network, from a converted copy where one is needed, which is made unless it is there."""
        source = self.checkpoint
        if self._block is not None and source.quantization is None:
            bits = BITS[self.precision]
            copy = own_copy(source, bits)
            if not is_current(copy, source, bits):
                yield from convert(source, copy, bits, replace=True)
            source = Checkpoint(copy)
        return (yield from load_backbone(source, self.dtype, self._block))
