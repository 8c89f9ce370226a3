"""Where a model's parts are: the layout of a checkpoint folder, its names, and which one a person means.

Nothing here reads a weight; headers of safetensors files are read to say early what is wrong.
"""

from __future__ import annotations

import json
import os
import stat
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from ..files import is_hidden, is_plain
from ..progress import OnStep, ignore
from . import hub
from .config import BackboneConfig
from .sizes import ImageSizes

HUB_MODEL = "inclusionAI/LLaDA2.0-Uni"
BUILT_IN = Path(__file__).parent.parent / "builtin/shapes"


class Part(Enum):
    """A part of a checkpoint that is loaded on its own; the value is what a person calls it."""

    BACKBONE = "backbone"
    IMAGE_TOKENIZER = "image tokenizer"
    DECODER = "decoder"
    DECODER_TURBO = "turbo decoder"
    PRIOR = "SigVQ prior"  # which both decoders have among their files
    VAE = "VAE"

    @property
    def word(self) -> str:
        """What the command line calls it."""
        return self.name.lower().replace("_", "-")


WEIGHTS = "model*.safetensors"  # of the backbone
# Each part's files, as globs from the checkpoint folder: the same list checks a folder and limits a download.
FILES = {
    Part.BACKBONE: ("config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS),
    Part.IMAGE_TOKENIZER: (
        "image_tokenizer/config.json",
        "image_tokenizer/preprocessor_config.json",
        "image_tokenizer/*.safetensors",
    ),
    Part.DECODER: ("decoder/config.json", "decoder/*.safetensors", "image_tokenizer/sigvq_embedding.pt"),
    Part.DECODER_TURBO: (
        "decoder-turbo/config.json",
        "decoder-turbo/*.safetensors",
        "image_tokenizer/sigvq_embedding.pt",
    ),
    Part.PRIOR: ("image_tokenizer/sigvq_embedding.pt",),
    Part.VAE: ("vae/config.json", "vae/*.safetensors"),
}
TOLD = tuple(
    part for part in Part if part is not Part.PRIOR
)  # to a person: the decoders have the prior among their files
INDEX = "model.safetensors.index.json"
COMPLETE = "complete"  # the state of a part that lacks nothing
HUB_LIST = "hub.txt"  # beside the model folders: ids of hub models to choose from
COPY_BITS = (8, 6, 4)  # of the smaller copies of a backbone that lie in its model's folder


class TensorInfo(NamedTuple):
    """A tensor that a safetensors header names."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it: "BF16", "F32", ...


@dataclass(frozen=True)
class Checkpoint:
    """A folder in the layout of inclusionAI/LLaDA2.0-Uni; every loader is handed one of these."""

    root: Path

    def files(self, part: Part) -> list[Path]:
        """The files of ``part`` that are there, sorted."""
        return sorted(path for pattern in patterns(part) for path in visible(self.root, pattern))

    def fingerprint(self, *parts: Part) -> tuple[tuple, ...]:
        """The state of the files of ``parts``: it changes when they are replaced, and with nothing else."""
        files = sorted({path for part in parts for path in self.files(part)})
        return tuple((path.relative_to(self.root).as_posix(), *_stamp(path)) for path in files)

    def copy_folder(self, bits: int) -> Path:
        """Where a smaller copy of the backbone lies in this folder."""
        return self.root / f"mlx-{bits}bit"

    def copies(self) -> dict[int, Checkpoint]:
        """The complete smaller copies of the backbone in this folder, by their bits, the most exact first."""
        found = {bits: Checkpoint(self.copy_folder(bits)) for bits in COPY_BITS}
        return {bits: copy for bits, copy in found.items() if copy.root.is_dir() and copy._is_copy()}

    def _is_copy(self) -> bool:
        try:
            return not self.missing(Part.BACKBONE, published=True) and self.quantization is not None
        except CheckpointError:
            return False

    def missing(self, part: Part, published: bool = False) -> list[str]:
        """The files of ``part`` that this folder lacks or has damaged, relative to it, some as globs; empty if it is complete.

        Args:
            published: the backbone's own weights are meant. Else a smaller copy stands for those that are not there.

        Raises:
            CheckpointError: the index of the backbone cannot be used.
        """
        return list(self.faults(part, published))

    def faults(self, part: Part, published: bool = False) -> dict[str, str]:
        """What ``missing`` names, each with what is the matter: a predicate, for a person.

        Raises:
            CheckpointError: as ``missing``.
        """
        return self._lacks(part, published) | self._surplus(part)

    def state(self, part: Part) -> str:
        """How complete a part is, in a few words, which begin with ``COMPLETE`` if it is."""
        try:
            faults = self.faults(part)
        except CheckpointError as error:
            return str(error)
        if not faults and part is Part.BACKBONE and self.is_copy_alone:
            return f"{COMPLETE}, as a smaller copy ({' and '.join(f'{bits}bit' for bits in self.copies())})"
        if not faults:
            return COMPLETE
        if set(faults.values()) == {ABSENT}:
            return f"missing {', '.join(faults)}"
        return f"incomplete: {told(faults)}"

    def _lacks(self, part: Part, published: bool = False) -> dict[str, str]:
        stands = part is Part.BACKBONE and not published and self.is_copy_alone
        return self._absent_or_damaged(part, weights=not stands)

    @property
    def is_copy_alone(self) -> bool:
        """Whether a smaller copy stands for the backbone's own weights, which are not there. Damaged ones it does not hide."""
        try:
            lacks = self._absent_or_damaged(Part.BACKBONE)
            faults = {fault for name, fault in lacks.items() if name == INDEX or fnmatchcase(name, WEIGHTS)}
        except CheckpointError:  # an index that says nothing
            faults = set() if visible(self.root, WEIGHTS) else {ABSENT}
        return faults == {ABSENT} and bool(self.copies())

    def _absent_or_damaged(self, part: Part, weights: bool = True) -> dict[str, str]:
        lacks, wanted = {}, [pattern for pattern in FILES[part] if weights or pattern != WEIGHTS]
        for pattern in wanted:
            if not visible(self.root, pattern):
                found = [self.root / pattern] if "*" not in pattern else _found(self.root, pattern)
                faults = [fault for path in found if (fault := _fault(path))]
                lacks[pattern] = faults[0] if faults else ABSENT
        needed = [path for pattern in wanted for path in visible(self.root, pattern)]
        if part is Part.BACKBONE and weights:
            if os.path.lexists(self.root / INDEX):
                shards = [self.root / name for name in sorted(set(self.weight_map().values()))]
                needed = [path for path in needed if path.suffix != ".safetensors"] + shards
            else:
                shards = visible(self.root, WEIGHTS)
                if len(shards) > 1 or visible(self.root, "model*-of-*.safetensors"):  # only the index says how many
                    lacks[INDEX] = ABSENT
        surplus = [path for pattern in self._surplus(part) for path in visible(self.root, pattern)]
        faults = {path.relative_to(self.root).as_posix(): _fault(path) for path in needed if path not in surplus}
        return lacks | {name: fault for name, fault in faults.items() if fault}

    def _surplus(self, part: Part) -> dict[str, str]:
        """The globs that find several files where one is expected: nobody knows which is meant."""
        found = {pattern: visible(self.root, pattern) for pattern in FILES[part] if pattern.endswith("/*.safetensors")}
        return {
            pattern: f"stands for {len(paths)} files, where exactly one is expected ({_some([p.name for p in paths])})"
            for pattern, paths in found.items()
            if len(paths) > 1
        }

    def require(self, *parts: Part) -> Checkpoint:
        """This checkpoint, if it is a folder that has all of ``parts``.

        Raises:
            CheckpointError: there is no such folder, or a part is not in it.
        """
        if not os.path.isdir(self.root):
            raise CheckpointError(f"There is no model folder {self.root}.")
        for part in parts:
            lacks = self._lacks(part)
            if lacks and ABSENT not in lacks.values():
                name, fault = next(iter(lacks.items()))
                raise CheckpointError(f"{self.root / name} {fault}. {hub.again(self.root / name)}")
            if lacks:
                repo = hub.repo_of(self.root)
                command = f" with: llada2-mlx download {repo} --parts {part.word}" if repo else ""
                raise CheckpointError(
                    f"The model folder {self.root} has no complete {part.value}: {told(lacks)}. A folder in the layout "
                    f"of {HUB_MODEL} is needed. Choose another model, or download what is missing{command or '.'}"
                )
            for pattern in self._surplus(part):  # said now, not after the work that comes before the part
                self.only_safetensors(pattern.partition("/")[0])
        return self

    def json(self, name: str) -> dict[str, Any]:
        """The JSON object in the file ``name``."""
        path = self.root / name
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing.") from None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be read as JSON ({error}). {hub.again(path)}") from None
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} holds no JSON object. {hub.again(path)}")
        return content

    @cached_property
    def config(self) -> BackboneConfig:
        """The backbone's config."""
        try:
            return BackboneConfig.from_dict(self.json("config.json"))
        except CheckpointError as error:
            raise CheckpointError(f"{self.root}: {error}") from None

    @cached_property
    def quantization(self) -> dict[str, Any] | None:
        """How the backbone is quantised, as its config states it; None where it is not."""
        return self.json("config.json").get("quantization")

    @cached_property
    def world(self) -> str:
        """All that a toy knows, as its config states it, for a person; empty for a model of everything."""
        world = self.json("config.json").get("world", "")
        return world if isinstance(world, str) else ""

    @cached_property
    def image_sizes(self) -> ImageSizes:
        """What sizes of picture the model was made for; nothing stated where there is no ``config.json``.

        Raises:
            CheckpointError: what is stated cannot be used.
        """
        if not os.path.lexists(self.root / "config.json"):  # a part that was downloaded alone
            return ImageSizes()
        try:
            return ImageSizes.from_dict(self.json("config.json").get("image_sizes", {}))
        except CheckpointError as error:
            raise CheckpointError(f"{self.root}: {error}") from None

    def backbone_tensors(self) -> dict[str, TensorInfo]:
        """Every tensor of the backbone, from the headers of the files that the index names (or of the one file)."""
        if not os.path.lexists(self.root / INDEX):
            files = visible(self.root, WEIGHTS)
            if len(files) != 1:
                raise CheckpointError(f"{self.root} has {len(files)} weight files but no {INDEX}; download it.")
            return safetensors_header(files[0])
        named = self.weight_map()
        files = sorted({self.root / name for name in named.values()})
        tensors = {name: info for path in files for name, info in safetensors_header(path).items()}
        if absent := [f"{name} (in {file})" for name, file in named.items() if name not in tensors]:
            raise CheckpointError(f"{self.root}: {INDEX} names tensors that are not in their files: {_some(absent)}.")
        return tensors

    def weight_bytes(self, part: Part) -> int:
        """About what the weights of a part that runs in PyTorch take in memory."""
        weights = [path for path in self.files(part) if path.suffix in (".safetensors", ".pt")]
        stored = sum(stamp[0] for path in weights if (stamp := _stamp(path)))
        return 2 * stored if part is Part.VAE else stored  # the VAE runs in float32

    def weight_map(self) -> dict[str, str]:
        """Tensor name -> file name, as the index states it."""
        found = self.json(INDEX).get("weight_map")
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
            raise CheckpointError(f"{self.root / INDEX} has no usable weight_map. {hub.again(self.root / INDEX)}")
        if outside := sorted({name for name in found.values() if not is_plain(name)}):
            raise CheckpointError(
                f"{self.root / INDEX} names {outside[0]!r}, which is no file of this model. Only files inside the "
                f"model's folder that are not hidden are read. {hub.again(self.root / INDEX)}"
            )
        return found

    def only_safetensors(self, folder: str) -> Path:
        """The single safetensors file of a sub-folder; releases name it differently."""
        files = visible(self.root / folder, "*.safetensors")
        if len(files) != 1:
            which = f" Keep the model's own one of {_some([path.name for path in files])}." if files else ""
            raise CheckpointError(
                f"{self.root / folder} has {len(files)} safetensors files; exactly one is expected.{which}"
            )
        return files[0]


def visible(folder: Path, pattern: str) -> list[Path]:
    """The files that ``pattern`` finds in ``folder`` and that are not hidden, sorted."""
    return [path for path in _found(folder, pattern) if os.path.isfile(path)]


def _found(folder: Path, pattern: str) -> list[Path]:
    """All that ``pattern`` finds in ``folder`` and is not hidden, files or not; nothing where that cannot be read."""
    with suppress(OSError):
        found = folder.glob(pattern)
        return sorted(path for path in found if not is_hidden(path.relative_to(folder).as_posix()))
    return []


def _stamp(path: Path) -> tuple[int, ...]:
    """Size and time of a file; nothing of one that vanished or may not be read, which its loader says."""
    with suppress(OSError):
        found = path.stat()
        return found.st_size, found.st_mtime_ns
    return ()


ABSENT = "is not there"


def _fault(path: Path) -> str | None:
    """What can be seen to be the matter with a file without reading it all; None if nothing is."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            return "is no file"
        return (
            None if _is_whole(path, about.st_size, about.st_mtime_ns) else "cannot be read: it is truncated or damaged"
        )
    except FileNotFoundError:
        return ABSENT
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"


@lru_cache(1024)
def _is_whole(path: Path, size: int, changed: int) -> bool:
    """Whether a file ends where its kind says that it ends; looked at once until its size or its time changes."""
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="numpy"):  # compares the header with the file's length
                    return True
            except SafetensorError:
                return False
        if path.suffix == ".json":
            with suppress(ValueError, RecursionError):
                return json.loads(file.read()) is not None
            return False
        return zipfile.is_zipfile(file) if file.read(2) == b"PK" else size > 0  # how PyTorch stores, now and formerly


def safetensors_header(path: Path) -> dict[str, TensorInfo]:
    """Names, shapes and types of the tensors in a safetensors file, without reading them.

    Raises:
        CheckpointError: the file is truncated or is no safetensors file.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: TensorInfo(path, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read: it is truncated or damaged ({error}). {hub.again(path)}"
        ) from None


def check_tensors(found: dict[str, TensorInfo], expected: dict[str, tuple[int, ...]], where: Path) -> None:
    """Compare the tensors of a checkpoint with what a network needs.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape; some are named, with their file.
    """
    problems = []
    if missing := [name for name in expected if name not in found]:
        problems.append(f"missing: {_some(missing)}")
    # a tensor without elements is what an absent layer leaves
    unexpected = [
        f"{name} in {info.file.name}" for name, info in found.items() if name not in expected and 0 not in info.shape
    ]
    if unexpected:
        problems.append(f"unexpected: {_some(unexpected)}")
    if wrong := [
        f"{name} in {found[name].file.name} is {list(found[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != tuple(shape)
    ]:
        problems.append(f"of another shape than the config says: {_some(wrong)}")
    if problems:
        raise CheckpointError(f"The tensors in {where} do not fit its config; {'; '.join(problems)}.")


def model_folders(roots: Iterable[Path]) -> tuple[dict[str, Path], list[str]]:
    """The model folders in ``roots`` by name, the first of a name counting; and a sentence on each that cannot be read."""
    found: dict[str, Path] = {}
    problems: list[str] = []
    for root in roots:
        try:
            folders = [root / name for name in os.listdir(root) if not is_hidden(name)]
        except FileNotFoundError:  # a place that nobody has put a model in
            continue
        except OSError as error:
            problems.append(_unread(root, error))
            continue
        for folder in folders:
            try:
                if stat.S_ISDIR(folder.stat().st_mode) and folder.name not in found:
                    os.listdir(folder)  # a folder that may not be listed says so here
                    found[folder.name] = hub.snapshot(folder)
            except (OSError, ValueError) as error:  # ValueError: a name of a revision that is no text
                problems.append(_unread(folder, error))
    return found, problems


def listed_ids(roots: Iterable[Path]) -> tuple[list[str], list[str]]:
    """The hub ids in the files ``hub.txt`` of ``roots``, one a line; and a sentence on each line that has none.

    What follows a ``#`` is a comment.
    """
    found: dict[str, None] = {}
    problems: list[str] = []
    for path in (root / HUB_LIST for root in roots):
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
            problems.append(f"{path} cannot be read ({reason}), so no model in it is offered. Mend it, or remove it.")
            continue
        for number, line in enumerate(lines, 1):
            name = line.partition("#")[0].strip()
            if hub.is_id(name):
                found[name] = None
            elif name:
                problems.append(
                    f"{path}, line {number}: {name!r} is no hub id such as {HUB_MODEL}, and is left out. Write one id a line."
                )
    return list(found), problems


def cached_ids() -> list[str]:
    """The hub ids of the models in the hub's cache whose language model is one of this layout, sorted."""
    found = []
    for repo, folder in hub.cached_models().items():
        with suppress(CheckpointError):
            if Checkpoint(folder).config:
                found.append(repo)
    return sorted(found)


def _unread(folder: Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or error
    return f"{folder} cannot be read ({reason}), so no model in it is offered. Allow reading it, or remove it."


def resolve(
    model: str | Path, *parts: Part, on_step: OnStep = ignore, verify: bool = False, published: bool = False
) -> Checkpoint:
    """The checkpoint that a person means by ``model``: a folder, or the id of a hub model to download.

    Only the files of ``parts`` are downloaded, into the hub's own cache; what is there is taken from there, and then
    the hub is not asked. Each part is complete where it is found, and two calls for two parts give one folder: a
    model is completed at the revision that the cache has. Only where another program moved the cache on to a newer
    revision, or the hub no longer has the old one, can the two be folders of two revisions.

    A file is taken for whole when it ends where it has to: a safetensors file where its header says so.

    Args:
        on_step: called while something is downloaded or verified; what it raises ends that.
        verify: read every file that is there of a hub model, of whichever part, and compare it with its sum; what is
            damaged is downloaded again.
        published: a smaller copy of the backbone does not stand for its own weights: they are downloaded.

    Raises:
        CheckpointError: there is neither such a folder nor such a model, a part is missing in it, or it could not be
            downloaded.
    """
    folder = _folder(model)
    if folder is not None:
        return Checkpoint(folder).require(*parts)
    repo = str(model)
    if not hub.is_id(repo):
        raise CheckpointError(f"There is no model folder {model}. Give a folder, or a hub id such as {HUB_MODEL}.")
    here = hub.cached(repo)
    if here is None:
        if not parts:
            raise CheckpointError(f"{repo} is not on this machine. Download it with: llada2-mlx download {repo}")
        lacking, doubts = f"{repo} is not on this machine", set()
        missing = [name for part in parts for name in FILES[part]]
    else:
        lacks = {part: found for part in parts if (found := _mendable(here, part, published))}
        missing = [name for names in lacks.values() for name in names]
        doubts = _doubts(here, on_step) if verify else set()
        if not missing and not doubts:
            return Checkpoint(here).require(*parts)
        what = [f"no complete {part.value}: {told(names)}" for part, names in lacks.items()]
        what = what or [f"files that are damaged or have to be compared with the hub's: {_some(sorted(doubts))}"]
        lacking = f"{repo} on this machine has {'; '.join(what)}"
    wanted = {pattern for part in parts for pattern in patterns(part)}
    if here is not None and not published and Checkpoint(here).is_copy_alone:
        wanted.discard(WEIGHTS)
    found = hub.download(repo, sorted(wanted | doubts), missing, lacking, on_step, doubts | set(missing))
    return Checkpoint(found).require(*parts)


def _folder(model: str | Path) -> Path | None:
    """The folder of a model that is given as one; None where there is no such folder."""
    try:
        folder = Path(model).expanduser()
        return hub.snapshot(folder) if stat.S_ISDIR(folder.stat().st_mode) else None
    except (FileNotFoundError, NotADirectoryError, RuntimeError):  # RuntimeError: ~ of nobody
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model} cannot be read ({getattr(error, 'strerror', None) or error}).") from None


def _mendable(folder: Path, part: Part, published: bool = False) -> dict[str, str]:
    """What a download would mend of a part."""
    try:
        return Checkpoint(folder)._lacks(part, published)
    except CheckpointError:  # an index that says nothing
        return {INDEX: "cannot be used"}


def _doubts(folder: Path, on_step: OnStep) -> set[str]:
    """The names of the files in a folder of the hub's cache that are damaged, or that only the hub can tell of."""
    files = {path for part in Part for path in Checkpoint(folder).files(part)}
    damaged, unknown = hub.doubtful(folder, sorted(path.relative_to(folder).as_posix() for path in files), on_step)
    return {*damaged, *([] if hub.is_offline() else unknown)}


def patterns(part: Part) -> tuple[str, ...]:
    """The globs of all that a part may have: what it needs, and the index that a backbone in shards has."""
    return (*FILES[part], INDEX) if part is Part.BACKBONE else FILES[part]


def told(faults: dict[str, str]) -> str:
    """What is the matter with files, for a person: the first few names with each fault."""
    names: dict[str, list[str]] = {}
    for name, fault in faults.items():
        names.setdefault(fault, []).append(name)
    return "; ".join(f"{_some(each)} {fault}" for fault, each in names.items())


def _some(names: list[str], limit: int = 3) -> str:
    """The first few of ``names``, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
