"""Kill -9 at random points: what is there afterwards is whole, and the next run is right.

``make kills``, or ``python -m reliability`` in the folder ``tests``. A program is killed in front of the nth thing that it does to
files (making, opening to write, renaming, removing), or after a random time; once, or a few times in a row. Then it runs to its
end, and what it made is compared with what it makes when nobody kills it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hub_server import Hub, serving, talk_to
from PIL import Image
from safetensors.torch import load_file, save_file
from storyteller import codes, write_storyteller
from synthetic import tiny, write_strewn

from llada2_mlx.checkpoint.layout import HUB_MODEL, Checkpoint
from llada2_mlx.errors import LLaDA2Error
from llada2_mlx.files import is_temporary
from llada2_mlx.vq import VQGrid

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
IN_A_ROW = 3  # kills before the run that is let to its end, at most
PATIENCE = 300  # seconds that a run may take
# to be imported once, and not in each process that is killed
PRELOADED = ["reliability.kills", "llada2_mlx.cli", "llada2_mlx.backbone.fetch", "llada2_mlx.imaging.decoder_copy"]
PRELOADED += ["llada2_mlx.imaging.engine", "llada2_mlx.imaging.vae", "llada2_mlx.story", "llada2_mlx.tasks"]


class Work:
    """Something that a program does to files in a folder, and may be killed in.

    ``expected`` is what it makes when nobody kills it; the runner sets it.
    """

    name = ""
    expected: Any = None

    def prepare(self, folder: Path) -> None:
        """Make the folder as it is before the first run."""

    def run(self, folder: Path) -> None:
        """What the program does. It runs in a process of its own."""
        raise NotImplementedError

    def made(self, folder: Path) -> Any:
        """What it has made, to be compared; and whatever lies where nothing has to."""
        raise NotImplementedError

    def after_a_kill(self, folder: Path) -> None:
        """Assert what has to hold of a run that was killed."""

    def at_the_end(self, folder: Path) -> None:
        """Assert that the run that was let to its end made what it makes when nobody kills it."""
        compare(self.made(folder), self.expected)


class Copying(Work):
    """A copy of a model with few bits, its decoders too, its other parts linked: ``llada2-mlx convert``."""

    name = "conversion"

    def prepare(self, folder: Path) -> None:
        shutil.copytree(tiny(), folder / "source")

    def run(self, folder: Path) -> None:
        command("convert", folder / "source", folder / "copy", "--bits", "4", "--decoder-bits", "8")

    def made(self, folder: Path) -> Any:
        return content(folder)


class Replacing(Work):
    """The copy that a model has in its folder is made again, because the model has changed: what a node does."""

    name = "conversion in the place of an older copy"

    def prepare(self, folder: Path) -> None:
        shutil.copytree(tiny(), folder / "source")
        self.run(folder)
        changed(folder / "source/model.safetensors")

    def run(self, folder: Path) -> None:
        from llada2_mlx.backbone.handle import Backbone

        Backbone(Checkpoint(folder / "source"), "4bit").load()

    def made(self, folder: Path) -> Any:
        return content(folder)


class DecoderCopying(Work):
    """The copy of a decoder with 8 bits, which MLX runs."""

    name = "decoder copy"

    def prepare(self, folder: Path) -> None:
        shutil.copytree(tiny() / "decoder-turbo", folder / "decoder-turbo")

    def run(self, folder: Path) -> None:
        from llada2_mlx.imaging.decoder_copy import convert_decoder, own_copy
        from llada2_mlx.worker import MLXWorker

        source = folder / "decoder-turbo"
        MLXWorker().drive(convert_decoder(source, own_copy(source)))

    def made(self, folder: Path) -> Any:
        return content(folder)


class DecoderReplacing(DecoderCopying):
    """The same in the place of a copy of another decoder."""

    name = "decoder copy in the place of an older one"

    def prepare(self, folder: Path) -> None:
        super().prepare(folder)
        self.run(folder)
        changed(next((folder / "decoder-turbo").glob("*.safetensors")))


@dataclass
class Downloading(Work):
    """A model from the hub, all of its parts: ``llada2-mlx download``."""

    address: str
    served: dict[str, bytes]
    name = "download"
    options = ("--parts", "all")

    def run(self, folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            talk_to(SimpleNamespace(address=self.address), folder / "hub", patch)
            command("download", HUB_MODEL, *self.options)

    def made(self, folder: Path) -> Any:
        """The model's folder, links followed; and what lies beside, without the client's own locks and hidden half links."""
        return {
            "/".join(path.relative_to(folder).parts[2:]): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file() and ".locks" not in path.parts and not is_temporary(path.name)
        }

    def at_the_end(self, folder: Path) -> None:
        super().at_the_end(folder)
        (snapshot,) = folder.glob("hub/models--*/snapshots/*")
        there = content(snapshot)
        compare({name: there.get(name) for name in self.kept()}, self.kept())

    def kept(self) -> dict[str, bytes]:
        """The files of the hub that have to be here in the end."""
        return self.served


class Fetching(Downloading):
    """A copy with few bits that is made while its model arrives: ``llada2-mlx download --bits 4``."""

    name = "conversion while downloading"
    options = ("--bits", "4")

    def kept(self) -> dict[str, bytes]:
        large = ("model-", "decoder/")  # used up, and not asked for
        return {name: held for name, held in self.served.items() if not name.startswith(large)}


class Saving(Work):
    """A grid that is saved over another, again and again: ``VQGrid.save``, which the nodes and the commands call."""

    name = "saving a grid"

    def grids(self) -> list[VQGrid]:
        rng = np.random.default_rng(0)
        return [VQGrid(rng.integers(0, 16384, (64, 64)), 16384) for _ in range(2)]

    def run(self, folder: Path) -> None:
        for grid in 20 * self.grids():
            grid.save(folder / "codes.safetensors", {"prompt": "x" * 10_000})

    def made(self, folder: Path) -> Any:
        return content(folder)

    def after_a_kill(self, folder: Path) -> None:
        for path in seen(folder):  # nothing that a list of files shows is half a file
            assert path.name == "codes.safetensors" and VQGrid.load(path) in self.grids(), path

    def at_the_end(self, folder: Path) -> None:
        (path,) = seen(folder)  # its bytes differ: the order of what is noted in it does not matter
        assert VQGrid.load(path) == self.grids()[-1]


@dataclass
class Telling(Work):
    """A story in words and pictures: ``llada2-mlx story``, whose folder has to be new or empty."""

    model: Path
    name = "a story"

    def run(self, folder: Path) -> None:
        told = folder / "story"
        if not told.exists() or not seen(told):
            self.tell(told)
            return
        # a story that was begun is refused and not replaced; what it has is decoded, and the next gets another folder
        try:
            self.tell(told)
        except Failed as error:
            assert "is not empty" in str(error), error
        else:
            raise AssertionError("a story was told over another")
        for path in told.glob("*.safetensors"):
            command("decode", path, "--model", self.model, "--decoder-steps", "2", "-o", path.with_suffix(".png"))
        shutil.rmtree(folder / "again", ignore_errors=True)
        self.tell(folder / "again")

    def tell(self, folder: Path) -> None:
        one_by_one = ["--block-length", "1", "--steps", "1", "--text-steps", "1", "--precision", "float32"]
        command("story", "Tell it.", *one_by_one, "--model", self.model, "--decoder-steps", "2", "-o", folder)

    def made(self, folder: Path) -> Any:
        return {path.name: path.read_bytes() for path in seen(folder / "story")}

    def after_a_kill(self, folder: Path) -> None:
        for told in (folder / "story", folder / "again"):
            whole(told)

    def at_the_end(self, folder: Path) -> None:
        last = "again" if (folder / "again").exists() else "story"
        whole(folder / "story")
        whole(folder / last)
        found = {path.name: path.read_bytes() for path in seen(folder / last)}
        pictures = lambda files: {
            name: Image.open(io.BytesIO(held)).tobytes() for name, held in files.items() if name.endswith(".png")
        }
        texts = lambda files: {name: held for name, held in files.items() if name.endswith((".md", ".html"))}
        assert sorted(found) == sorted(self.expected), sorted(found)
        compare(texts(found), texts(self.expected))
        compare(pictures(found), pictures(self.expected))  # ``whole`` has looked at the codes


def whole(story: Path) -> None:
    """Assert that what a story's folder shows is whole, and that its text names no picture whose codes are not there."""
    names = {path.name for path in seen(story)} if story.exists() else set()
    for name in names:
        path = story / name
        if path.suffix == ".safetensors":
            assert VQGrid.load(path).to_list() == codes(int(path.stem.removeprefix("picture_")) - 1), path
        elif path.suffix == ".png":
            with Image.open(path) as picture:
                picture.load()
        else:
            assert name in ("story.md", "index.html"), path
    if "story.md" in names:
        text = (story / "story.md").read_text()
        assert text.endswith("\n")
        for number in range(1, 1 + text.count("![picture")):
            assert f"picture_{number}.safetensors" in names
    if "index.html" in names:
        assert {"picture_1.png", "picture_2.png", "story.md"} <= names


# --- the parts of it ----------------------------------------------------------------------------------------------


class Failed(Exception):
    """A command ended with an error; its words."""


def command(*words: object) -> None:
    """Run a command of the pack in this process.

    Raises:
        Failed: its exit status is not 0.
    """
    from llada2_mlx import cli

    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(io.StringIO()):
        status = cli.main([str(word) for word in words])
    if status:
        raise Failed(said.getvalue())


def content(folder: Path) -> dict[str, bytes]:
    """Every file in a folder, hidden ones too, but for locks without content: nobody holds one whose program is dead."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: held for name, held in found.items() if held or not name.endswith(".lock")}


def seen(folder: Path) -> list[Path]:
    """The files that a person sees in a folder. What a killed program was writing is hidden."""
    return sorted(path for path in folder.iterdir() if not is_temporary(path.name))


def changed(weights: Path) -> None:
    """Make a file of weights another one: its header says something else."""
    save_file(load_file(weights), weights, {"changed": "yes"})


def compare(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Assert that two sets of files are equal; what is in JSON may be in another order."""

    def meaning(name: str, held: Any) -> Any:
        return json.loads(held) if name.endswith(".json") and held is not None else held

    assert sorted(found) == sorted(expected), f"there is {sorted(set(found) ^ set(expected))} on one side alone"
    differing = [name for name in found if meaning(name, found[name]) != meaning(name, expected[name])]
    assert not differing, f"another content: {differing}"


# --- killing ------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What became of a run: ``killed``, or what it raised, empty if it did what it should; and what it did to files."""

    killed: bool
    error: str
    changes: int
    seconds: float


def _context():
    """Processes that begin with everything imported, where that can be: Apple's libraries do not like to be forked."""
    if sys.platform == "darwin":
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def start(work: Work, folder: Path, at: int = 0, after: float = 0.0) -> Outcome:
    """Run ``work`` in a process of its own, to its end or until it is killed.

    Args:
        at: kill it in front of the nth change of a file in the folder; 0: not.
        after: kill it so many seconds after it began; 0: not.
    """
    context = _context()
    changes, began, said = context.Value("i", 0), context.Event(), folder.with_name(folder.name + ".error")
    said.unlink(missing_ok=True)
    process = context.Process(target=_child, args=(work, folder, at, changes, began, said))
    process.start()
    if not began.wait(PATIENCE):
        process.kill()
        raise TimeoutError("a process did not begin")
    begun = time.monotonic()
    if after:
        process.join(after)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        process.join()
        return Outcome(False, f"it did not end in {PATIENCE} s", changes.value, time.monotonic() - begun)
    killed = process.exitcode == -signal.SIGKILL
    error = said.read_text() if said.exists() else "" if killed or not process.exitcode else f"exit {process.exitcode}"
    return Outcome(killed, error, changes.value, time.monotonic() - begun)


def _child(work: Work, folder: Path, at: int, changes: Any, began: Any, said: Path) -> None:
    inside = str(folder.resolve())

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & WRITES:
                return
        elif event in CHANGES:
            path = arguments[-2] if event in ("os.mkdir", "os.link", "os.symlink") else arguments[0]
        else:
            return
        path = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
        # a folder is emptied by names that are relative to it
        if path.startswith(inside) or event in ("os.remove", "os.rmdir") and not os.path.isabs(path):
            with changes.get_lock():
                changes.value += 1
            if changes.value == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    began.set()
    try:
        work.run(folder)
    except BaseException as error:
        said.write_text(f"{type(error).__name__}: {error}")
        os._exit(1)
    os._exit(0)  # nothing of the pytest or the command that started it is run again


@dataclass
class Score:
    """What was tried with one kind of work."""

    kills: int = 0
    runs: int = 0
    changes: int = 0
    at: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def torment(work: Work, folder: Path, kills: int, rng: random.Random, at: Sequence[int] | None = None) -> Score:
    """Kill ``work`` at ``kills`` random points at least, and compare what comes out.

    Args:
        folder: a new one, to work in.
        at: the changes of files in front of which it is killed instead, one after the other; what is negative counts from the
            end.
    """
    score = Score()
    undisturbed = _prepared(work, folder / "undisturbed")
    outcome = start(work, undisturbed)
    assert not outcome.killed and not outcome.error, f"{work.name}, undisturbed: {outcome.error}"
    work.expected, score.changes = work.made(undisturbed), outcome.changes
    chosen = None if at is None else [[(number % (outcome.changes + 1), 0.0)] for number in at]
    while score.kills < kills if chosen is None else score.runs < len(chosen):
        where = _prepared(work, folder / f"trial-{score.runs}")
        points = (
            [_point(rng, outcome) for _ in range(rng.randint(1, IN_A_ROW))] if chosen is None else chosen[score.runs]
        )
        try:
            for number, after in points:
                if not (tried := start(work, where, number, after)).killed:
                    assert not tried.error, tried.error
                    break  # it was done before
                score.kills += 1
                score.at["in front of a change" if number else "after a time"] += 1
                work.after_a_kill(where)
            last = start(work, where)
            assert not last.killed and not last.error, f"the next run: {last.error or 'it was killed'}"
            work.at_the_end(where)
        except (AssertionError, LLaDA2Error, OSError, ValueError) as error:
            score.problems.append(f"{work.name}, killed at {points}: {type(error).__name__}: {error}")
        score.runs += 1
        shutil.rmtree(where)
    return score


def _point(rng: random.Random, undisturbed: Outcome) -> tuple[int, float]:
    if rng.random() < 0.6:
        return rng.randint(1, undisturbed.changes), 0.0
    return 0, rng.uniform(0.001, undisturbed.seconds)


def _prepared(work: Work, folder: Path) -> Path:
    folder.mkdir(parents=True)
    work.prepare(folder)
    return folder


def works(folder: Path, stack: ExitStack, only: list[str] | None = None) -> list[Work]:
    """All that there is to be killed, with what it needs in ``folder``."""
    hub: Hub = stack.enter_context(serving(write_strewn(folder / "published"), HUB_MODEL))
    hub.pause = 0.0005
    served = content(hub.folder)
    found = [
        Downloading(hub.address, served),
        Fetching(hub.address, served),
        Copying(),
        Replacing(),
        DecoderCopying(),
        DecoderReplacing(),
        Saving(),
        Telling(write_storyteller(folder / "storyteller")),
    ]
    return [work for work in found if not only or any(word in work.name for word in only)]


def main() -> None:
    """Kill, and report; fails where a next run was not right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=15, help="of each kind of work, at least (default: 15)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="the kinds of work whose name has one of the words")
    a = parser.parse_args()
    scores: dict[str, Score] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        print("| work | changes of files | kills | in front of a change, after a time | runs to the end | wrong |")
        print("|---|---|---|---|---|---|")
        for number, work in enumerate(works(Path(folder), stack, a.only)):
            rng = random.Random(f"{a.seed} {work.name}")
            score = scores[work.name] = torment(work, Path(folder) / f"work-{number}", a.kills, rng)
            kinds = ", ".join(str(score.at[kind]) for kind in ("in front of a change", "after a time"))
            print(
                f"| {work.name} | {score.changes} | {score.kills} | {kinds} | {score.runs} | {len(score.problems)} |",
                flush=True,
            )
            for problem in score.problems:
                print(f"\n{problem}\n", flush=True)
    print(f"\n{sum(score.kills for score in scores.values())} kills.")
    sys.exit(any(score.problems for score in scores.values()))
