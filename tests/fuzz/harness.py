"""What has to hold whatever is put in: an answer, or one of our own errors in words; soon; and nothing written elsewhere."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from llada2_mlx.errors import LLaDA2Error

PATIENCE = 120  # seconds that one input may take; what hangs takes for ever
LONGEST = 2500  # characters of an error that a person is to read
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_MADE = {"os.rename": 1, "os.mkdir": 0, "os.link": 1, "os.symlink": 1, "os.remove": 0, "os.rmdir": 0, "os.truncate": 0}


class Hang(Exception):
    """An input took too long."""


@dataclass(frozen=True)
class Target:
    """Something that takes inputs of one kind.

    Args:
        name: what a person calls it.
        inputs: the strategy that makes them.
        check: takes an input; raises one of our errors where it is refused, and ``AssertionError`` where a result is wrong.
        cost: how many times as long as the quickest target it takes, about: as many inputs fewer are tried.
    """

    name: str
    inputs: st.SearchStrategy
    check: Callable[[Any], None]
    cost: int = 1


@dataclass
class Result:
    """What was tried of a target: how many inputs, how many of them were refused, and what went wrong, if anything.

    ``stopped`` is whether a person ended it before."""

    target: Target
    tried: int
    refused: int
    seconds: float
    wrong: BaseException | None = None
    stopped: bool = False


def fuzz(target: Target, count: int, number: int) -> Result:
    """Try ``count`` inputs, or all that there are, of seed ``number``. The first that is wrong is made as small as can be."""
    tried, refused, begun = 0, 0, time.monotonic()

    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )
    @given(target.inputs)
    def attempt(what: Any) -> None:
        nonlocal tried, refused
        tried += 1
        with inside(Path(tempfile.gettempdir())), in_time(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries, about what they are given here
            try:
                target.check(what)
            except LLaDA2Error as error:
                refused += 1
                require_readable(str(error))

    wrong, stopped = None, False
    try:
        attempt()
    except KeyboardInterrupt:
        stopped = True
    except BaseException as error:
        wrong = error
    return Result(target, tried, refused, time.monotonic() - begun, wrong, stopped)


def require_readable(sentence: str) -> None:
    """Assert that an error is in words, and not longer than a person reads."""
    assert len(sentence.split()) > 3, f"an error without words: {sentence!r}"
    assert len(sentence) <= LONGEST, f"an error of {len(sentence)} characters: {sentence[:300]!r}"
    assert "Traceback" not in sentence and "object at 0x" not in sentence, sentence


@contextmanager
def in_time() -> Iterator[None]:
    """Raises ``Hang`` where the work takes too long."""

    def late(*_: object) -> None:
        raise Hang(f"longer than {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


_allowed: list[str] = []
_hooked: list[bool] = []


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Raises ``AssertionError`` where a file outside ``folder`` is written, made, renamed or removed."""
    if not _hooked:  # a hook stays for as long as the program runs
        sys.addaudithook(_watch)
        _hooked.append(True)
    _allowed.append(str(folder.resolve()))
    try:
        yield
    finally:
        _allowed.pop()


def _watch(event: str, arguments: tuple) -> None:
    if not _allowed:
        return
    if event == "open":
        path, _, flags = arguments
        if not isinstance(flags, int) or not flags & _WRITES:
            return
    elif event in _MADE:
        path = arguments[_MADE[event]]
    else:
        return
    if not isinstance(path, (str, bytes, os.PathLike)):
        return
    where = os.path.abspath(os.fsdecode(path))
    if where.startswith(_allowed[-1]) or "__pycache__" in where or where.startswith("/dev/"):
        return
    raise AssertionError(f"{event} of {where}, outside {_allowed[-1]}")
