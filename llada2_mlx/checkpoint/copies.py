"""What all smaller copies share, whatever they are of: where they lie, what they say they were made of, and who writes them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import Timeout

from ..errors import CheckpointError, LLaDA2Error
from ..files import in_users_cache, locked, summed
from ..progress import amount

STATE = "conversion.json"  # in a copy: what it was made of, and how


def place_of(inside: Path, is_current: Callable[[Path], bool]) -> Path:
    """Where a copy lies that is made by itself: ``inside`` the folder of its source, or in the user's cache if that is read-only."""
    if os.access(inside.parent, os.W_OK) or is_current(inside):
        return inside
    return in_users_cache(inside.parent, inside.name)


def state_of(folder: Path) -> dict[str, Any] | None:
    """What a copy says of itself; None where nothing can be read."""
    try:
        state = json.loads((folder / STATE).read_text())
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None


def sizes_and_sums(paths: Iterable[Path]) -> dict[str, list]:
    """What a copy is made of, as its state has it: sizes of files, and their sums."""
    return {path.name: [path.stat().st_size, summed(path)] for path in paths}


def occupied(copy: Path) -> str:
    """What to say where something else is in a copy's place."""
    return f"{copy} is where the converted copy goes, but it holds something else. Rename or delete it."


def require_room(folder: Path, size: int, what: str, otherwise: str = "") -> None:
    """Refuse what does not fit on the disk of ``folder``: ``size`` bytes more than are there now.

    Args:
        what: takes them, for a person.
        otherwise: what a person can do but make room: how the sentence ends.

    Raises:
        CheckpointError: it does not fit.
    """
    free = shutil.disk_usage(folder).free
    if size > free:
        raise CheckpointError(
            f"{what} takes {amount(size)} in {folder.parent}, where {amount(free)} are free. Make room{otherwise}."
        )


@contextmanager
def alone(path: Path, busy: str = "is being written") -> Iterator[None]:
    """No other program works on ``path`` meanwhile.

    Args:
        busy: what one does, for a person.

    Raises:
        LLaDA2Error: one does.
    """
    lock = path.with_name(f".{path.name}.lock")
    try:
        with locked(lock):
            yield
            if lock.exists() and not lock.stat().st_size:  # one with something in it is somebody's
                lock.unlink()
    except Timeout:
        raise LLaDA2Error(f"{path} {busy} by another program; wait until it is done.") from None


@contextmanager
def writing(copy: Path, kept: bool = True) -> Iterator[None]:
    """What keeps a copy from being written becomes a sentence.

    Args:
        kept: whether the next run goes on with what is done.

    Raises:
        LLaDA2Error: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise LLaDA2Error(
            f"{copy} cannot be written ({error.strerror or error}). Make room or allow writing there, and try again"
            f"{': what is done is kept' if kept else ''}."
        ) from error


@contextmanager
def written_alone(copy: Path, kept: bool = True) -> Iterator[None]:
    """A copy is written that no other program works on meanwhile; the folder that it lies in is made.

    Args:
        kept: as in ``writing``.

    Raises:
        LLaDA2Error: another program does, or it cannot be written.
    """
    with writing(copy, kept):
        copy.parent.mkdir(parents=True, exist_ok=True)
        with alone(copy):
            yield
