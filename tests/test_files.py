"""One lock at a time, on disks that have locks and on those that have none."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path

import pytest
from filelock import Timeout

from llada2_mlx.files import is_temporary, locked, replacing


class Stopped(Exception):
    pass


def refuse() -> None:
    raise Stopped


def test_who_does_not_wait_is_told(tmp_path: Path) -> None:
    with locked(tmp_path / "lock"), pytest.raises(Timeout), locked(tmp_path / "lock"):
        pass
    with locked(tmp_path / "lock"):  # it was given back
        pass


def test_who_waits_has_it_next(tmp_path: Path) -> None:
    order, held, asked = [], threading.Event(), threading.Event()

    def hold() -> None:
        with locked(tmp_path / "lock"):
            held.set()
            assert asked.wait(10)
            order.append("first")

    first = threading.Thread(target=hold)
    first.start()
    assert held.wait(10)
    with locked(tmp_path / "lock", asked.set):
        order.append("second")
    first.join()
    assert order == ["first", "second"] and asked.is_set()


def test_what_the_wait_raises_ends_it(tmp_path: Path) -> None:
    began = time.monotonic()
    with locked(tmp_path / "lock"), pytest.raises(Stopped), locked(tmp_path / "lock", refuse):
        pass
    assert time.monotonic() - began < 5
    with locked(tmp_path / "lock", refuse):
        pass


@pytest.mark.parametrize("waiting", [None, refuse])
@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK])
def test_a_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, waiting) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, "no locks")

    monkeypatch.setattr("fcntl.flock", fail)
    done = []
    with locked(tmp_path / "lock", waiting):
        done.append(1)
    with pytest.raises(Stopped), locked(tmp_path / "lock", waiting):  # the work's own errors stay what they are
        raise Stopped
    assert done


@pytest.mark.parametrize("waiting", [None, refuse])
def test_a_lock_that_cannot_be_made(tmp_path: Path, waiting) -> None:
    (tmp_path / "lock").mkdir()
    with pytest.raises(OSError), locked(tmp_path / "lock", waiting):
        pass


def test_what_is_being_written_is_known_by_its_name(tmp_path: Path) -> None:
    with replacing(tmp_path / "file.partial") as partial:
        assert is_temporary(partial.name) and not is_temporary("file.partial")
        partial.touch()
