"""Writing files so that nothing is ever half-written."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# what a disk answers that has no locks, as many on a network
_NO_LOCKS = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK}


def has_no_locks(error: BaseException) -> bool:
    """Whether a lock could not be taken because the disk has none."""
    return isinstance(error, NotImplementedError) or getattr(error, "errno", None) in _NO_LOCKS


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock ``path``; on a disk that has no locks the work goes on without one.

    Raises:
        Timeout: another program holds it.
    """
    from filelock import FileLock

    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        if not has_no_locks(error):
            raise
    try:
        yield
    finally:
        lock.release()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that becomes it when the block ends well, and vanishes when it does not."""
    partial = path.with_name(f".{os.getpid()}-{time.monotonic_ns():x}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
