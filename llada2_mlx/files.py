"""Files: which are hidden, what they hold, locks, and writing so that nothing is ever half-written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_TEMPORARY = re.compile(r"\.\d+-[0-9a-f]+\.partial")
# what a disk answers that has no locks, as many on a network
_NO_LOCKS = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK}


def is_hidden(name: str) -> bool:
    """Whether a file, named relative to a folder, is one that macOS and others leave; it is never a model's."""
    return any(part.startswith(".") for part in name.split("/"))


def is_plain(name: str) -> bool:
    """Whether a name is a relative path that stays inside its folder, with nothing hidden on the way."""
    plain = name and not any(character in name for character in "\\:\0")
    return bool(plain) and all(name.split("/")) and not is_hidden(name)


def is_temporary(name: str) -> bool:
    """Whether a file's name is one that ``replacing`` gives: where nobody writes it, a killed program left it."""
    return _TEMPORARY.fullmatch(name) is not None


def holds_nothing(folder: Path) -> bool:
    """Whether a folder has nothing in it but what killed programs were writing."""
    return all(is_temporary(path.name) for path in folder.iterdir())


def remove_temporary(folder: Path) -> None:
    """Remove what killed programs were writing in a folder and those in it; nobody may be writing there."""
    for path in list(folder.rglob("*.partial")):
        if is_temporary(path.name):
            path.unlink()


@contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Holds the lock ``path``; on a disk that has no locks the work goes on without one.

    Args:
        waiting: called about once a second while another program holds the lock; what it raises ends the wait. Without
            it nobody waits.

    Raises:
        Timeout: another program holds the lock, and ``waiting`` was not given.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path, mode=0o664)  # as the hub's client has it: a cache may belong to a group
    while True:
        try:
            lock.acquire(timeout=0 if waiting is None else 1)
            break
        except Timeout:
            if waiting is None:
                raise
            waiting()
        except (OSError, NotImplementedError) as error:
            if not _has_no_locks(error):
                raise
            break
    try:
        yield
    finally:
        with suppress(OSError):  # as where the disk went away; the lock ends with the program
            lock.release()


def _has_no_locks(error: BaseException) -> bool:
    return isinstance(error, NotImplementedError) or getattr(error, "errno", None) in _NO_LOCKS


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that becomes it when the block ends well, and vanishes when it does not."""
    partial = path.with_name(f".{os.getpid()}-{time.monotonic_ns():x}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, as models' configs are written."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def in_users_cache(folder: Path, name: str) -> Path:
    """Where what would lie in a folder by this name is kept if the folder is read-only."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "llada2-mlx" / "-".join(folder.resolve().parts[1:]) / name


def summed(path: Path, suffix: str = "") -> str:
    """The SHA-256 of a file, or of the header of a safetensors file: a copy of a model may have other times."""
    with path.open("rb") as file:
        if (suffix or path.suffix) != ".safetensors":
            return hashlib.file_digest(file, "sha256").hexdigest()
        length = file.read(8)
        # no longer than a header may be, whatever a damaged file says
        return hashlib.sha256(length + file.read(min(int.from_bytes(length, "little"), 10**8))).hexdigest()
