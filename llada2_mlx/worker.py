"""A thread of its own for MLX.

MLX streams belong to threads: an array that is not yet evaluated can be evaluated only where it was made. And a
thread that used MLX has to clear its streams before it ends, or the process aborts at exit (ml-explore/mlx#4373).
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Thread, current_thread
from typing import Any, TypeVar

import mlx.core as mx

from .progress import OnStep, Progress, ignore

CACHE_BYTES = 10**9  # of freed buffers MLX may keep no more, however large the machine is; less where memory is short

T = TypeVar("T")


class MLXWorker:
    """Runs calls one after the other on one thread, which ends with this object or with the process."""

    def __init__(self) -> None:
        self._calls: SimpleQueue = SimpleQueue()
        self._thread = Thread(target=_serve, args=(self._calls,), name="mlx", daemon=True)
        self._thread.start()
        weakref.finalize(self, _stop, self._calls, self._thread)

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """``function(*args)`` on the worker's thread; waits for it, and raises what it raises."""
        future: Future[T] = Future()
        self._calls.put((future, function, args))
        return future.result()

    def drive(
        self, steps: Generator[Progress, None, T], on_step: OnStep = ignore, wired: int = 0, cache: int = CACHE_BYTES
    ) -> T:
        """Run a generator on the worker's thread, step by step; returns its return value.

        MLX's buffer cache is empty afterwards: what work leaves there is memory that others miss.

        Args:
            on_step: called after each step in the caller's thread; what it raises ends the work before the next one.
            wired: bytes that the work needs and that Metal shall keep in memory meanwhile, see ``wired_limit``.
            cache: bytes of freed buffers that MLX may keep meanwhile.
        """

        def advance() -> tuple[Progress | None, T | None]:
            try:
                return next(steps), None
            except StopIteration as stop:
                return None, stop.value

        with wired_limit(wired, self.call), _cache_limit(cache, self.call):
            try:
                while True:
                    progress, result = self.call(advance)
                    if progress is None:
                        return result
                    on_step(progress)
            finally:
                self.call(steps.close)
                self.call(mx.synchronize)  # what a step that was given out still needs would come back into the cache
                self.call(mx.clear_cache)


@contextmanager
def wired_limit(needed: int, call: Callable[..., Any]) -> Iterator[None]:
    """Let Metal keep ``needed`` bytes in memory, at most what it recommends for this machine; restored at the end.

    MLX's own limit is 0: nothing is kept by force, and near the machine's limit the system pages weights out between two
    steps. Where there is no Metal, or nothing is needed, nothing is set.

    Args:
        call: calls a function on the thread that MLX runs on.
    """
    if not needed or not mx.metal.is_available():
        yield
        return
    limit = min(needed, int(mx.device_info()["max_recommended_working_set_size"]))
    before = call(mx.set_wired_limit, limit)
    try:
        yield
    finally:
        call(mx.synchronize)  # what still runs may use what is kept
        call(mx.set_wired_limit, before)


@contextmanager
def _cache_limit(most: int, call: Callable[..., Any]) -> Iterator[None]:
    """Let MLX keep ``most`` bytes of freed buffers, or what its limit is if that is less; restored at the end."""
    before = call(mx.set_cache_limit, most)
    call(mx.set_cache_limit, min(most, before))
    try:
        yield
    finally:
        call(mx.set_cache_limit, before)


def on_cpu() -> bool:
    """Whether MLX runs on a CPU, as on Linux."""
    return mx.default_device().type == mx.DeviceType.cpu


def machine_bytes() -> int:
    """What MLX may use of this machine's memory: as Metal recommends it, else three quarters of what there is."""
    info = mx.device_info()
    if recommended := info.get("max_recommended_working_set_size"):
        return int(recommended)
    total = info.get("total_memory") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(total) * 3 // 4


def _serve(calls: SimpleQueue) -> None:
    mx.set_cache_limit(min(CACHE_BYTES, mx.set_cache_limit(CACHE_BYTES)))
    while (call := calls.get()) is not None:
        future, function, args = call
        try:
            future.set_result(function(*args))
        except BaseException as error:  # whatever it is, it belongs to the caller
            future.set_exception(error)
        del call, future, function, args  # they may hold arrays
    mx.clear_streams()


def _stop(calls: SimpleQueue, thread: Thread) -> None:
    calls.put(None)
    if thread is not current_thread():
        thread.join()
