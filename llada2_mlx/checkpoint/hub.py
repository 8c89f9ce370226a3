"""The Hugging Face hub: what its cache on this machine holds of a model, and how the rest gets there.

The session, addresses and credentials are the hub client's, and so is the layout of its cache. Each answer is judged here
before anything of it is kept, because the client (2.4) compares no sums and keeps pages in place of files, throws a file
away that did not arrive whole, and copies files to their names where a disk has no links.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any

from ..errors import CheckpointError
from ..files import is_hidden, locked, replacing
from ..progress import OnStep, Progress, amount

RESERVE = 10**9  # bytes that a download leaves free on the disk
_CONNECTIONS = 4
_INTERVAL = 0.2  # seconds between two calls of on_step
_GRACE = 1.0  # seconds that a cancelled download may take to close its files
_TIMEOUT = 20.0  # seconds for the hub's answer about a model
_TRIES = 5  # connections in a row that bring nothing


def is_id(model: str) -> bool:
    """Whether ``model`` has the form of a hub id, ``owner/name``."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return model.count("/") == 1


def is_offline() -> bool:
    """Whether the user wants the hub never to be asked."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def cached(repo: str) -> Path | None:
    """The folder in the hub's cache with what is there of a model, complete or not; the hub is not asked.

    Raises:
        CheckpointError: the cache cannot be read.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:  # without patterns the client takes a folder with some of the parts for an error
        found = Path(snapshot_download(repo, local_files_only=True, allow_patterns=[]))
        return found if _is_revision(found.name) and found.parent == _store(repo) / "snapshots" else None
    except LocalEntryNotFoundError:
        return None
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise CheckpointError(
            f"What {_store(repo)} holds cannot be read ({_reason(error)}). Allow reading it, or remove it and download "
            f"the model again."
        ) from None


def cached_models() -> dict[str, Path]:
    """Hub id -> folder of every model that the hub's cache has something of; one that cannot be read is left out."""
    found: dict[str, Path] = {}
    with suppress(OSError):  # no cache yet
        for store in sorted(_cache().glob("models--*--*")):
            with suppress(OSError, ValueError):
                if (folder := snapshot(store)) != store and folder.is_dir():
                    found[store.name.removeprefix("models--").replace("--", "/")] = folder
    return found


def snapshot(folder: Path) -> Path:
    """``folder``; or the model in it, if it is one that the hub's cache keeps (``models--owner--name``).

    Raises:
        OSError, ValueError: it is one, and what it says of its revision cannot be read or is none.
    """
    main = folder / "refs" / "main"
    if (folder / "snapshots").is_dir() and main.is_file():
        name = main.read_text().strip()
        if not _is_revision(name):
            raise ValueError(f"{name!r} is no revision")
        return folder / "snapshots" / name
    return folder


def _is_revision(name: str) -> bool:
    """Whether a revision's folder may have this name; it is read from a file that anybody may have written."""
    return name not in (".", "..") and re.fullmatch(r"[\w.-]+", name) is not None


def repo_of(path: Path) -> str | None:
    """The hub id of the model that a file or folder in the hub's cache belongs to; None where it is not in there."""
    for folder in path.parents:
        if folder.name.startswith("models--") and Path(os.path.realpath(folder.parent)) == _cache():
            return folder.name.removeprefix("models--").replace("--", "/")
    return None


def again(path: Path) -> str:
    """What to do about a damaged file of a model, as a sentence: ``download`` compares what is there with its sums."""
    repo = repo_of(path)
    return f"Download it again with: llada2-mlx download {repo}" if repo else "Download it again."


def doubtful(folder: Path, names: Collection[str], on_step: OnStep) -> tuple[list[str], list[str]]:
    """Compare files in the hub's cache with the sums that the cache calls them by; the hub is not asked.

    Args:
        folder: of a revision, as ``cached`` gives it.
        names: of the files, relative to it.
        on_step: called in this thread with the bytes that have been read; what it raises ends the work.

    Returns:
        The names of the damaged ones; and those of the files whose sums only the hub knows, as on a disk without links.
    """
    known = {name: found for name in names if (found := _stated_sum(folder / name))}
    sizes = {}
    for name in known:
        with suppress(OSError):
            sizes[name] = (folder / name).stat().st_size
    read = dict.fromkeys(known, 0)

    def check(name: str, stop: Event) -> bool:
        def note(size: int) -> None:
            read[name] += size

        try:
            return _sum(folder / name, len(known[name]) == 64, stop, note) == known[name]
        except OSError:
            return False

    def tell() -> None:
        on_step(Progress("checking files", sum(read.values()), sum(sizes.values()), in_bytes=True))

    whole = _together([lambda stop, name=name: check(name, stop) for name in known], tell)
    return [name for name, good in zip(known, whole) if not good], [name for name in names if name not in known]


def download(
    repo: str, patterns: list[str], missing: list[str], lacking: str, on_step: OnStep, doubts: Collection[str] = ()
) -> Path:
    """Fetch files of a hub model into the hub's cache. What is whole stays, and a part of a file is gone on with.

    A file gets its name when it has the size and the sum that the hub states. A large file that has its name is
    taken for whole if its size is right, unless it is among ``doubts``.

    A model that the cache has some of is completed at that revision, so that its parts stay together in one folder;
    only if the hub no longer has the revision is the present one taken, into a folder of its own.

    Args:
        repo: the hub id.
        patterns: globs of the files that are wanted; hidden files never are.
        missing: those among them, or files, that the hub has to have.
        lacking: what this machine lacks, for a person: the beginning of a sentence.
        on_step: called in this thread with the bytes that have arrived; what it raises ends the download, and what
            has arrived is kept.
        doubts: names of files that are read and compared with their sums, large as they may be.

    Returns:
        The folder of the revision, with the files in it.

    Raises:
        CheckpointError: the hub may not be asked, cannot be reached or has no such model or file, what answers is
            not the hub, or the disk has too little room.
    """
    _require_online(lacking)
    with _explained(repo, lacking):
        plan = _plan(repo, patterns, on_step)
        plan.require(missing)
        absent = plan.absent(doubts, on_step)
        plan.require_room(sum(file.size - plan.arrived(file) for file in absent))
        plan.fetch(absent, on_step)
    return plan.folder


class Arriving:
    """A hub model of which some files are fetched a few at a time, and removed when they have been used.

    Args:
        repo: the hub id.
        patterns: globs of the files that are wanted; hidden files never are.
        used: the glob of those among them that come and go. All others are fetched now, and stay.
        needed: globs that the hub has to have. What they find beside ``patterns`` is to be fetched later.
        lacking: what this machine lacks, for a person: the beginning of a sentence.
        on_step: as in ``download``.

    ``folder`` is that of the revision, ``sizes`` has the bytes of the files that come and go, by name, and ``later`` the
    bytes that are to be fetched later.

    Raises:
        CheckpointError: as ``download``.
    """

    def __init__(
        self, repo: str, patterns: Collection[str], used: str, needed: Collection[str], lacking: str, on_step: OnStep
    ):
        _require_online(lacking)
        self._repo, self._lacking = repo, lacking
        with _explained(repo, lacking):
            plan = _plan(repo, [*patterns, *needed], on_step)
            plan.require(list(needed))
            now = [file for file in plan.files if any(_fits(file.name, pattern) for pattern in patterns)]
            come = tuple(file for file in now if _fits(file.name, used))
            stay = replace(plan, files=tuple(file for file in now if file not in come))
            stay.fetch(stay.absent({file.name for file in stay.files}, on_step), on_step)
        self._plan = replace(plan, files=come, known=True)
        self.folder, self.sizes = plan.folder, {file.name: file.size for file in come}
        self.later = sum(file.size - plan.arrived(file) for file in plan.files if file not in now)

    def require_room(self, needed: int) -> None:
        """Refuse what does not fit on the disk: ``needed`` bytes more than are there now."""
        self._plan.require_room(needed)

    def arrived(self, name: str) -> int:
        """The bytes of a file that are here."""
        (file,) = self._chosen([name]).files
        return self._plan.arrived(file)

    def fetch(self, names: Collection[str], on_step: OnStep, before: int = 0) -> None:
        """Fetch files. One that is here is compared with its sum.

        Args:
            before: bytes that came and went already, to be counted in ``on_step``.

        Raises:
            CheckpointError: as ``download``.
        """
        chosen = self._chosen(names)
        with _explained(self._repo, self._lacking):
            absent = chosen.absent(names, on_step)
            chosen.fetch(absent, on_step, before, sum(self.sizes.values()))

    def drop(self, names: Collection[str], on_step: OnStep) -> None:
        """Remove files, and what has arrived of them. A content that another revision of the model has stays."""
        chosen = self._chosen(names)
        with _explained(self._repo, self._lacking):
            jobs = [lambda stop, file=file: chosen.drop(file, stop) for file in chosen.files]
            _together(jobs, lambda: on_step(Progress("removing what is converted", 0, 1)))

    def _chosen(self, names: Collection[str]) -> _Plan:
        return replace(self._plan, files=tuple(file for file in self._plan.files if file.name in names))


@contextmanager
def _explained(repo: str, lacking: str) -> Iterator[None]:
    """An error of a thread that worked with the hub becomes a sentence for the person who waits."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except _Failed as failure:
        error = failure.__cause__
        if not isinstance(error, (HTTPError, OSError, _Foreign)):
            raise error from None
        raise CheckpointError(_why(repo, lacking, error)) from error


def _require_online(lacking: str) -> None:
    if is_offline():
        raise CheckpointError(
            f"{lacking}, and HF_HUB_OFFLINE is set, so that nothing is downloaded. Unset it or choose another model."
        )


@dataclass(frozen=True)
class _File:
    """A file on the hub; ``blob`` is what the cache calls its content: the SHA-256 of a large one, git's sum of a small."""

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
    sums: dict[tuple, str] = field(default_factory=dict)  # of files that were read, by which file it is, size and time

    @property
    def store(self) -> Path:
        return _store(self.repo)

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
        names = [file.name for file in self.files]
        if absent := [each for each in patterns if not any(_fits(name, each) for name in names)]:
            raise CheckpointError(
                f"{self.repo} on the hub has no {absent[0]}; a model in the layout of LLaDA2.0-Uni is needed."
            )

    def absent(self, doubts: Collection[str], on_step: OnStep) -> list[_File]:
        """The files that are not here, or not whole. What stands in the place of one and is damaged is removed."""

        looked: list[str] = []

        def look(file: _File, stop: Event) -> bool:
            if found := not self.whole(file, stop, file.name in doubts):
                if any(map(os.path.lexists, (self.blob(file), self.folder / file.name))):
                    self._clear(file, stop)
            looked.append(file.name)
            return found

        def tell() -> None:
            on_step(Progress("checking files", len(looked), len(self.files)))

        found = _together([lambda stop, file=file: look(file, stop) for file in self.files], tell)
        return [file for file, absent in zip(self.files, found) if absent]

    def _clear(self, file: _File, stop: Event) -> None:
        """Remove what stands in the place of a file's content and is something else."""
        with self._alone(file, stop):  # another program may be just about to give it its name
            if not self.holds(self.blob(file), file, stop):
                _remove(self.blob(file))
            named = self.folder / file.name
            if not named.is_symlink() and not self.holds(named, file, stop):  # a link is replaced when there is a file
                _remove(named)

    def whole(self, file: _File, stop: Event, doubted: bool = False) -> bool:
        """Whether a file is here under its name."""
        named = self.folder / file.name
        return self.holds(named, file, stop) if doubted or not file.large else _size(named) == file.size

    def holds(self, path: Path, file: _File, stop: Event) -> bool:
        """Whether ``path`` holds just what the hub has as ``file``."""
        with suppress(OSError):
            about = path.stat()
            if not stat.S_ISREG(about.st_mode) or about.st_size != file.size:
                return False
            key = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
            if key not in self.sums:
                self.sums[key] = _sum(path, file.large, stop)
            return self.sums[key] == file.blob
        return False

    def require_room(self, needed: int) -> None:
        """Refuse what does not fit on the disk, before any of it is fetched: ``needed`` bytes."""
        cache = _cache()
        place = next(path for path in (cache, *cache.parents) if os.path.exists(path))
        try:
            free = shutil.disk_usage(place).free
        except OSError:  # a disk that does not tell; when it is full, it will
            return
        if needed and needed + RESERVE > free:
            raise CheckpointError(
                f"{self.repo} needs {amount(needed)} more in {cache} and {amount(RESERVE)} to spare, and "
                f"{amount(free)} are free on that disk. Make room, or set HF_HOME to a folder on another disk."
            )

    def fetch(self, absent: list[_File], on_step: OnStep, before: int = 0, total: int | None = None) -> None:
        """Fetch files; ``before`` and ``total`` are bytes, where these files are a part of a larger whole."""
        counted = absent if total is None else self.files
        total = sum(file.size for file in absent) if total is None else total

        def tell() -> None:
            on_step(Progress("downloading", before + sum(map(self.arrived, counted)), total, in_bytes=True))

        # first, because an index says which large files there are
        _together([lambda stop, file=file: self._fetch(file, stop) for file in absent if not file.large], tell)
        if not self.known:
            _together([lambda stop: self._note()], tell)
        _together([lambda stop, file=file: self._fetch(file, stop) for file in absent if file.large], tell)

    def _note(self) -> None:
        """Make this revision the one that the cache holds as the model's."""
        main = self.store / "refs" / "main"
        main.parent.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(main) as partial:
            partial.write_text(self.commit)

    @contextmanager
    def _alone(self, file: _File, stop: Event) -> Iterator[None]:
        """The client's own lock, so that no two programs write to one file."""

        def waiting() -> None:
            if stop.is_set():
                raise _Stopped

        lock = _cache() / ".locks" / self.store.name / f"{file.blob}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with locked(lock, waiting):
            waiting()
            yield

    def _fetch(self, file: _File, stop: Event) -> None:
        self.blob(file).parent.mkdir(parents=True, exist_ok=True)
        with self._alone(file, stop):
            if self.whole(file, stop, doubted=True):  # another program fetched it meanwhile
                return
            if not self.holds(self.blob(file), file, stop):
                self._receive(file, stop)
            self._name(file)

    def drop(self, file: _File, stop: Event) -> None:
        """Remove a file and what has arrived of it; its content stays where another revision has it."""
        blob, named = self.blob(file), self.folder / file.name
        with self._alone(file, stop):
            _remove(named)
            _remove(self.partial(file))
            revisions = self.folder.parent.iterdir()
            if not any(os.path.realpath(revision / file.name) == str(blob) for revision in revisions):
                _remove(blob)

    def _receive(self, file: _File, stop: Event) -> None:
        """Get a file's content; it becomes the blob when its sum is right."""
        partial = self.partial(file)
        try:
            with _PartialFile(partial, stop) as target:
                if target.size() > file.size:
                    target.cut(0)
                tries = _TRIES
                while (begun := target.size()) < file.size:
                    try:
                        self._ask(file, target)
                    except Exception as error:
                        tries = _TRIES if target.size() > begun else tries - 1
                        if not _is_fleeting(error) or tries < 0 or stop.wait(1):
                            raise
            if _sum(partial, file.large, stop) != file.blob:
                partial.unlink()
                raise CheckpointError(
                    f"{file.name} arrived damaged, and what had arrived was removed. Download it again."
                )
            partial.replace(self.blob(file))
        finally:
            if not _size(partial):
                partial.unlink(missing_ok=True)

    def _ask(self, file: _File, target: _PartialFile) -> None:
        """One request for what is lacking of a file. Nothing is kept of an answer that is not the file."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        url, begun = hf_hub_url(self.repo, file.name, revision=self.commit), target.size()
        headers = build_hf_headers() | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={begun}-"} if begun else {})
        how = {
            "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT,
            "retry_on_exceptions": (),
            "retry_on_status_codes": (408, 429),
        }
        with http_stream_backoff("GET", url, headers=headers, **how) as response:
            hf_raise_for_status(response)
            at = _place(response, begun, file.size)
            chunks = response.iter_bytes(constants.DOWNLOAD_CHUNK_SIZE)
            first = next(chunks, b"")  # as long as the chunks are to be, or the whole answer
            if at + len(first) < min(at + constants.DOWNLOAD_CHUNK_SIZE, file.size):
                raise _Foreign(response)
            target.cut(at)  # an answer may begin again, but what is here goes only for what looks like the file
            for chunk in chain([first], chunks):
                if target.size() + len(chunk) > file.size:
                    break
                target.write(chunk)
            else:
                if target.size() == file.size:
                    return
            target.cut(at)
            raise _Foreign(response)

    def _name(self, file: _File) -> None:
        """Give what has arrived its name: by a link, or by moving it where the disk has none. It is stored once."""
        from huggingface_hub import constants

        blob, named = self.blob(file), self.folder / file.name
        named.parent.mkdir(parents=True, exist_ok=True)
        if not constants.HF_HUB_DISABLE_SYMLINKS:
            with suppress(OSError), replacing(named) as link:
                link.symlink_to(os.path.relpath(blob, named.parent))
            if named.is_symlink() and _size(named) == file.size:
                return
        blob.replace(named)


def _plan(repo: str, patterns: list[str], on_step: OnStep) -> _Plan:
    """Ask the hub which files there are."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, RevisionNotFoundError

    here = cached(repo)

    def look(revision: str | None) -> Any:
        return HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT)

    def ask(stop: Event) -> _Plan:
        try:
            try:
                info = look(here.name if here else None)
            except RevisionNotFoundError:
                info = look(None)
            files = _listed(info.siblings, patterns)
            if not _matches(info.sha, r"[0-9a-f]{40}"):
                raise _Foreign
        except (HTTPError, OSError, _Foreign):
            raise
        except Exception as error:  # the client takes JSON of any shape for the hub's, and stumbles over it
            raise _Foreign from error
        return _Plan(repo, info.sha, here is not None and here.name == info.sha, files)

    (plan,) = _together([ask], lambda: on_step(Progress("asking the hub", 0, 1)))
    return plan


def _listed(siblings: Any, patterns: list[str]) -> tuple[_File, ...]:
    """The wanted files of a hub's answer.

    Raises:
        _Foreign: it is none that a hub could give.
    """
    names = [each.rfilename for each in siblings]
    if len(set(names)) < len(names) or not all(map(_is_name, names)):
        raise _Foreign
    files = []
    for each in siblings:
        if is_hidden(each.rfilename) or not any(_fits(each.rfilename, pattern) for pattern in patterns):
            continue
        large = each.lfs is not None
        size, blob = (each.lfs.size, each.lfs.sha256) if large else (each.size, each.blob_id)
        fits = _matches(blob, r"[0-9a-f]{64}" if large else r"[0-9a-f]{40}")
        if not fits or type(size) is not int or size < 0:
            raise _Foreign
        files.append(_File(each.rfilename, size, blob, large))
    return tuple(files)


def _fits(name: str, pattern: str) -> bool:
    """Whether a glob finds a name, folder by folder."""
    names, patterns = name.split("/"), pattern.split("/")
    return len(names) == len(patterns) and all(map(fnmatchcase, names, patterns))


def _is_name(name: Any) -> bool:
    """Whether a repository may have a file of this name: one inside it, on every system."""
    parts = name.split("/") if isinstance(name, str) else [""]
    return not any(part in ("", ".", "..") or re.search(r"[\\\0]|^\w:", part) for part in parts)


def _matches(value: Any, pattern: str) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


class _Foreign(Exception):
    """What answered is not the hub: most often the page on which a hotel or a train asks to sign in."""

    def __init__(self, response: Any = None):
        self.status = response.status_code if response is not None else 200
        kind = "a web page" if response is not None and _is_page(response) else "another answer"
        super().__init__(f"{kind}, status {self.status}")


def _is_page(response: Any) -> bool:
    return "html" in response.headers.get("Content-Type", "").lower()


def _is_foreign(response: Any) -> bool:
    """Whether what refuses is not the hub, which says why in words that a program can read."""
    if _is_page(response) or response.status_code in (407, 511):
        return True
    if not 400 <= response.status_code < 500 or response.status_code in (408, 416, 429):
        return False
    if {"x-error-code", "x-error-message"} & {name.lower() for name in response.headers}:
        return False
    if "xml" in response.headers.get("Content-Type", "").lower():  # the stores behind the hub
        return False
    try:
        return not isinstance(response.json()["error"], str)
    except Exception:  # no JSON, of another shape, or a body that was not read
        return True


def _is_fleeting(error: Exception) -> bool:
    """Whether a connection broke, and may not break again."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    return isinstance(error, HTTPError) and not isinstance(error, HfHubHTTPError) and not _is_loop(error)


def _is_loop(error: Exception) -> bool:
    """Whether an address leads from one to the next and never to the file."""
    return type(error).__name__ in ("TooManyRedirects", "UnsupportedProtocol", "DecodingError")


def _place(response: Any, begun: int, size: int) -> int:
    """The byte of a file at which an answer begins: where it was asked to, or the first.

    Raises:
        _Foreign: it is no answer with that file's content.
    """
    headers = response.headers
    if _is_page(response):
        raise _Foreign(response)
    if response.status_code == 206 and re.fullmatch(
        rf"bytes {begun}-\d+/({size}|\*)", headers.get("Content-Range", "")
    ):
        return begun
    plain = headers.get("Content-Encoding", "identity") == "identity"
    if response.status_code != 200 or (plain and headers.get("Content-Length", str(size)) != str(size)):
        raise _Foreign(response)
    return 0


def _why(repo: str, lacking: str, error: Exception) -> str:
    """What went wrong while downloading, as a sentence for the person who waits for it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    again = "and try again: what has arrived is kept."
    if isinstance(error, HfHubHTTPError) and _is_foreign(error.response):
        error = _Foreign(error.response)
    if isinstance(error, _Foreign) or _is_loop(error):
        broken = ", or the hub is out of order" if isinstance(error, _Foreign) and error.status >= 500 else ""
        return (
            f"{lacking}, and it could not be downloaded: what answered for {constants.ENDPOINT} is not the hub "
            f"({_reason(error)}). It is most likely the sign-in page of this network{broken}. Open any page in a "
            f"browser, sign in {again}"
        )
    if isinstance(error, GatedRepoError):
        return f"The hub gives {repo} only to those who asked for it: do so at {constants.ENDPOINT}/{repo}, and log in with: hf auth login"
    refused = isinstance(error, HfHubHTTPError) and error.response.status_code == 401
    if refused or isinstance(error, RepositoryNotFoundError):
        return f"The hub has no model {repo!r}, or it is private and you are not logged in. Check how it is written."
    if isinstance(error, HfHubHTTPError):
        answer = f"{error.response.status_code} {error.response.reason_phrase}".strip()
        return f"{lacking}, and it could not be downloaded: the hub answered {answer}. Wait a little {again}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk of {_cache()} is full. Make room {again}"
    if isinstance(error, OSError) and error.filename:
        return f"{repo} cannot be stored: {error.filename2 or error.filename} cannot be written ({error.strerror}). Change that {again}"
    return f"{lacking}, and it could not be downloaded from {constants.ENDPOINT} ({_reason(error)}). Check the network {again}"


def _reason(error: Exception) -> str:
    """The first line of an error's own text."""
    text = (getattr(error, "strerror", None) or str(error)).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(os.path.realpath(os.path.expanduser(constants.HF_HUB_CACHE)))  # not resolve(), which fails on a circle


def _store(repo: str) -> Path:
    """The folder in the cache that has all of a model."""
    from huggingface_hub.file_download import repo_folder_name

    return _cache() / repo_folder_name(repo_id=repo, repo_type="model")


def _size(path: Path) -> int | None:
    """The bytes of a file; None where there is none."""
    with suppress(OSError):
        about = path.stat()
        return about.st_size if stat.S_ISREG(about.st_mode) else None
    return None


def _remove(path: Path) -> None:
    """Remove a file or a link; a folder in its place is somebody's."""
    if path.is_dir() and not path.is_symlink():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.unlink(missing_ok=True)


def _stated_sum(path: Path) -> str | None:
    """The sum of a file that the cache has as a link: its blob is called by it."""
    with suppress(OSError):
        target = Path(os.readlink(path))
        if target.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", target.name):
            return target.name
    return None


def _sum(path: Path, large: bool, stop: Event, note: Callable[[int], None] = lambda size: None) -> str:
    """What the hub calls a file's content: its SHA-256 if it is large, or git's SHA-1."""
    found = hashlib.sha256() if large else hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as content:
        while chunk := content.read(2**20):
            if stop.is_set():
                raise _Stopped
            found.update(chunk)
            note(len(chunk))
    return found.hexdigest()


class _Failed(Exception):
    """A thread's error, as the cause of this one: what ``on_step`` raises is another matter."""


class _Stopped(Exception):
    """Ends a thread that nobody waits for any more."""


class _PartialFile(io.FileIO):
    """A file that grows at its end, without a buffer, until the download is stopped."""

    def __init__(self, path: Path, stop: Event):
        super().__init__(path, "ab")
        self._stop = stop

    def size(self) -> int:
        return os.fstat(self.fileno()).st_size

    def cut(self, size: int) -> None:
        if size < self.size():
            self.truncate(size)

    def write(self, chunk: bytes) -> int:
        if self._stop.is_set():
            raise _Stopped
        rest = memoryview(chunk)
        try:
            while rest:
                rest = rest[super().write(rest) :]
        except OSError as error:
            error.filename = self.name  # which tells it from an error of the network
            raise
        return len(chunk)


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
    if not jobs:
        return []
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
