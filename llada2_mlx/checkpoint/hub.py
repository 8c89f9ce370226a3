"""The Hugging Face hub: what its cache on this machine holds of a model, and how the rest gets there.

A large file is fetched by the hub client's ``http_get`` to where the client looks for it, because the client by itself
(2.4, over HTTP and over Xet alike) throws a file away that did not arrive whole. Everything else is the client's: names,
links, small files, credentials.
"""

from __future__ import annotations

import errno
import hashlib
import io
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any

from ..errors import CheckpointError
from ..files import has_no_locks
from ..progress import OnStep, Progress, amount

RESERVE = 10**9  # bytes that a download leaves free on the disk
_CONNECTIONS = 4
_INTERVAL = 0.2  # seconds between two calls of on_step
_GRACE = 1.0  # seconds that a cancelled download may take to close its files
_TIMEOUT = 20.0  # seconds for the hub's answer about a model


def is_id(model: str) -> bool:
    """Whether ``model`` has the form of a hub id, ``owner/name``."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return model.count("/") == 1


def cached(repo: str) -> Path | None:
    """The folder in the hub's cache with what is there of a model, complete or not; the hub is not asked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:  # without patterns the client takes a folder with some of the parts for an error
        return Path(snapshot_download(repo, local_files_only=True, allow_patterns=[]))
    except LocalEntryNotFoundError:
        return None


def snapshot(folder: Path) -> Path:
    """``folder``; or the model in it, if it is one that the hub's cache keeps (``models--owner--name``)."""
    main = folder / "refs" / "main"
    if (folder / "snapshots").is_dir() and main.is_file():
        return folder / "snapshots" / main.read_text().strip()
    return folder


def download(repo: str, patterns: list[str], missing: list[str], lacking: str, on_step: OnStep) -> Path:
    """Fetch files of a hub model into the hub's cache. What is there stays, and a part of a file is gone on with.

    A model that the cache has some of is completed at that revision, so that its parts stay together in one folder;
    only if the hub no longer has the revision is the present one taken, into a folder of its own.

    Args:
        repo: the hub id.
        patterns: globs of the files that are wanted.
        missing: those among them, or files, that the hub has to have.
        lacking: what this machine lacks, for a person: the beginning of a sentence.
        on_step: called in this thread with the bytes that have arrived; what it raises ends the download, and what
            has arrived is kept.

    Returns:
        The folder of the revision, with the files in it.

    Raises:
        CheckpointError: the hub may not be asked, cannot be reached or has no such model or file, or the disk has too
            little room.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError

    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(
            f"{lacking}, and HF_HUB_OFFLINE is set, so that nothing is downloaded. Unset it or choose another model."
        )
    try:
        plan = _plan(repo, patterns, on_step)
        plan.require(missing)
        plan.require_room()
        plan.fetch(on_step)
    except _Failed as failure:
        error = failure.__cause__
        if not isinstance(error, (HTTPError, OSError)):
            raise error from None
        raise CheckpointError(_why(repo, lacking, error)) from error
    return plan.folder


@dataclass(frozen=True)
class _File:
    """A file on the hub; ``blob`` is what the cache calls its content: for a large one, its SHA-256."""

    name: str
    size: int
    blob: str
    large: bool


@dataclass(frozen=True)
class _Plan:
    """Which files of which revision are wanted."""

    repo: str
    commit: str
    known: bool  # whether the cache holds this revision as the model's
    files: tuple[_File, ...]

    @property
    def store(self) -> Path:
        from huggingface_hub.file_download import repo_folder_name

        return _cache() / repo_folder_name(repo_id=self.repo, repo_type="model")

    @property
    def folder(self) -> Path:
        return self.store / "snapshots" / self.commit

    def arrived(self, file: _File) -> int:
        """The bytes of a file that are here."""
        # the first name again: a file may get it between two looks
        for path in (self.blob(file), self.partial(file), self.blob(file), self.folder / file.name):
            with suppress(OSError):  # what is the matter is said when it is written
                return min(path.stat().st_size, file.size)
        return 0

    def blob(self, file: _File) -> Path:
        return self.store / "blobs" / file.blob

    def partial(self, file: _File) -> Path:
        return self.store / "blobs" / f"{file.blob}.incomplete"  # the cache's own name for it

    def require(self, patterns: list[str]) -> None:
        """Refuse a model that lacks files, before any is fetched."""
        from huggingface_hub.utils import filter_repo_objects

        names = [file.name for file in self.files]
        if absent := [each for each in patterns if not any(filter_repo_objects(names, allow_patterns=each))]:
            raise CheckpointError(
                f"{self.repo} on the hub has no {absent[0]}; a model in the layout of LLaDA2.0-Uni is needed."
            )

    def require_room(self) -> None:
        """Refuse what does not fit on the disk, before any of it is fetched."""
        needed = sum(file.size - self.arrived(file) for file in self.files)
        cache = _cache()
        place = next(path for path in (cache, *cache.parents) if path.exists())
        free = shutil.disk_usage(place).free
        if needed and needed + RESERVE > free:
            raise CheckpointError(
                f"{self.repo} needs {amount(needed)} more in {cache} and {amount(RESERVE)} to spare, and "
                f"{amount(free)} are free on that disk. Make room, or set HF_HOME to a folder on another disk."
            )

    def fetch(self, on_step: OnStep) -> None:
        from huggingface_hub import snapshot_download

        absent = [file for file in self.files if not (self.folder / file.name).exists()]
        total = sum(file.size for file in absent)

        def tell() -> None:
            on_step(Progress("downloading", sum(map(self.arrived, absent)), total, in_bytes=True))

        def small(stop: Event) -> str:
            names = [file.name for file in self.files if not file.large]
            revision = self.commit if self.known else None  # asked for by no name, it becomes the cache's own
            return snapshot_download(self.repo, revision=revision, allow_patterns=names, tqdm_class=_no_bar())

        # first, because an index says which large files there are
        (folder,) = _together([small], tell)
        if Path(folder).name != self.commit:
            raise CheckpointError(f"{self.repo} was changed on the hub at this very moment; try again.")
        _together([lambda stop, file=file: self._fetch_large(file, stop) for file in absent if file.large], tell)

    def _fetch_large(self, file: _File, stop: Event) -> None:
        from huggingface_hub import hf_hub_download, hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        partial = self.partial(file)
        partial.parent.mkdir(parents=True, exist_ok=True)
        # the client's own lock, so that no two programs write to one file
        with _locked(_cache() / ".locks" / self.store.name / f"{file.blob}.lock", stop):
            if not self.blob(file).exists():
                with _PartialFile(partial, stop) as target:
                    if (begun := target.tell()) > file.size:
                        begun = target.truncate(0)
                    url = hf_hub_url(self.repo, file.name, revision=self.commit)
                    how = {"headers": build_hf_headers(), "tqdm_class": _no_bar()}
                    http_get(url, target, resume_size=begun, expected_size=file.size, **how)
                if begun:
                    _check_sum(partial, file)
                partial.replace(self.blob(file))
        hf_hub_download(self.repo, file.name, revision=self.commit)  # it is there: this gives it its name


def _plan(repo: str, patterns: list[str], on_step: OnStep) -> _Plan:
    """Ask the hub which files there are."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError
    from huggingface_hub.utils import filter_repo_objects

    here = cached(repo)

    def ask(stop: Event) -> Any:
        look = lambda revision: HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT)
        try:
            return look(here.name if here else None)
        except RevisionNotFoundError:
            return look(None)

    (info,) = _together([ask], lambda: on_step(Progress("asking the hub", 0, 1)))
    wanted = filter_repo_objects(info.siblings, allow_patterns=patterns, key=lambda each: each.rfilename)
    files = [
        _File(each.rfilename, each.lfs.size, each.lfs.sha256, large=True)
        if each.lfs
        else _File(each.rfilename, each.size or 0, each.blob_id, large=False)
        for each in wanted
    ]
    return _Plan(repo, info.sha, here is not None and here.name == info.sha, tuple(files))


def _why(repo: str, lacking: str, error: Exception) -> str:
    """What went wrong while downloading, as a sentence for the person who waits for it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the client's own text is about its options
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    again = "and try again: what has arrived is kept."
    if isinstance(error, GatedRepoError):
        return f"The hub gives {repo} only to those who asked for it: do so at {constants.ENDPOINT}/{repo}, and log in with: hf auth login"
    if isinstance(error, RepositoryNotFoundError):
        return f"The hub has no model {repo!r}, or it is private and you are not logged in. Check how it is written."
    if isinstance(error, HfHubHTTPError):
        answer = f"{error.response.status_code} {error.response.reason_phrase}".strip()
        return f"{lacking}, and it could not be downloaded: the hub answered {answer}. Wait a little {again}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk of {_cache()} is full. Make room {again}"
    if isinstance(error, OSError) and error.filename:
        return f"{repo} cannot be stored: {error.filename} cannot be written ({error.strerror}). Change that {again}"
    return f"{lacking}, and it could not be downloaded from {constants.ENDPOINT} ({reason.rstrip('.')}). Check the network {again}"


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().resolve()


def _no_bar() -> type:
    """The client's progress bar, switched off: ``on_step`` has the progress."""
    from huggingface_hub.utils import tqdm

    class NoBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs | {"disable": True})

    return NoBar


def _check_sum(partial: Path, file: _File) -> None:
    """Whether what arrived in two goes fits together; removed if not."""
    with partial.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != file.blob:
        partial.unlink()
        raise CheckpointError(f"{file.name} arrived damaged, and what had arrived was removed. Download it again.")


class _Failed(Exception):
    """A thread's error, as the cause of this one: what ``on_step`` raises is another matter."""


class _Stopped(Exception):
    """Ends a thread that nobody waits for any more."""


class _PartialFile(io.FileIO):
    """A file that grows at its end, without a buffer, until the download is stopped."""

    def __init__(self, path: Path, stop: Event):
        super().__init__(path, "ab")
        self._stop = stop

    def write(self, chunk: bytes) -> int:
        if self._stop.is_set():
            raise _Stopped
        rest = memoryview(chunk)
        while rest:
            rest = rest[super().write(rest) :]
        return len(chunk)


@contextmanager
def _locked(path: Path, stop: Event) -> Iterator[None]:
    from filelock import Timeout
    from huggingface_hub.utils import WeakFileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        while True:
            if stop.is_set():
                raise _Stopped
            try:
                stack.enter_context(WeakFileLock(path, timeout=1))
                break
            except Timeout:
                continue
            except (OSError, NotImplementedError) as error:
                if not has_no_locks(error):
                    raise
                break
        yield


def _together(jobs: list[Callable[[Event], Any]], tell: Callable[[], None]) -> list[Any]:
    """Run jobs on threads, and ``tell`` on this one until they are done; the first error ends them all.

    The threads are daemons: one whose connection hangs keeps nobody waiting, and ends when it next writes.

    Args:
        jobs: each is called with an event that says that nobody waits any more.

    Returns:
        What they return.

    Raises:
        _Failed: a job raised its cause.
    """
    stop, waiting, results = Event(), SimpleQueue(), [Future() for _ in jobs]
    for job in zip(jobs, results):
        waiting.put(job)

    def work() -> None:
        with suppress(Empty):
            while not stop.is_set():
                job, result = waiting.get_nowait()
                try:
                    result.set_result(job(stop))
                except BaseException as error:  # whatever it is, it belongs to the caller
                    result.set_exception(error)

    threads = [Thread(target=work, name="download", daemon=True) for _ in jobs[:_CONNECTIONS]]
    try:
        for thread in threads:
            thread.start()
        unfinished = set(results)
        while unfinished:
            tell()
            finished, unfinished = wait(unfinished, _INTERVAL, FIRST_COMPLETED)
            for result in finished:
                if error := result.exception():
                    raise _Failed from error
        tell()
        return [result.result() for result in results]
    finally:
        stop.set()
        deadline = time.monotonic() + _GRACE
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
