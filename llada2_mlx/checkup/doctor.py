"""What a person, or who helps them, has to know of a machine before anything else: in seconds, with nothing downloaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..checkpoint import hub
from ..checkpoint.layout import BUILT_IN, COMPLETE, HUB_MODEL, TOLD, Checkpoint, Part, model_folders
from ..errors import LLaDA2Error, RequestError
from ..progress import amount
from .known import doubts, doubts_of
from .machine import Machine, installed, this_machine
from .parity import Verdict, checks

if TYPE_CHECKING:
    import torch


class State(Enum):
    """How a line is meant."""

    FINE = "fine"
    DOUBT = "doubt"  # may explain something that is slow or fails
    WRONG = "wrong"  # this machine does not compute what it should


@dataclass(frozen=True)
class Line:
    """One thing that was found.

    Args:
        section: what it belongs to: "machine", "packages", "models", "parity".
        name, value: what it is.
        state: how it is meant.
        notes: sentences on what follows from it.
    """

    section: str
    name: str
    value: str
    state: State = State.FINE
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        mark = {State.FINE: " ", State.DOUBT: "?", State.WRONG: "!"}[self.state]
        return "\n".join([f"{mark} {self.name}: {self.value}", *(f"    {note}" for note in self.notes)])


def examine(models: Iterable[Path] = (), device: torch.device | None = None) -> Iterator[Line]:
    """All that there is to say, line by line as it is found.

    Args:
        models: folders with model folders in them, beside the built-in model and the hub's cache.
        device: where PyTorch runs; the library's choice if None.

    Raises:
        RequestError: there is no such folder.
    """
    models = list(models)
    if absent := [str(folder) for folder in models if not folder.is_dir()]:
        raise RequestError(f"There is no folder {absent[0]}. Give one that has model folders in it.")
    machine, versions = this_machine(), installed()
    yield from of_machine(machine)
    yield from of_packages(machine, versions)
    yield from _of_models(models)
    for check in checks(device):
        states = {Verdict.EQUAL: State.FINE, Verdict.REDUCED: State.DOUBT, Verdict.WRONG: State.WRONG}
        yield Line(
            "parity", f"{check.where}: {check.what}", f"{check.verdict.value} ({check.told})", states[check.verdict]
        )


def as_json(lines: Iterable[Line]) -> dict[str, Any]:
    """The same as an object that JSON can hold."""
    found = [asdict(line) | {"state": line.state.value} for line in lines]
    return {
        "version": __version__,
        "ok": all(line["state"] != State.WRONG.value for line in found),
        "lines": found,
    }


def of_machine(machine: Machine) -> Iterator[Line]:
    """The machine, and what MLX and PyTorch compute on."""
    said = tuple(doubts_of(machine))
    yield Line("machine", "this pack", __version__)
    state = State.DOUBT if said else State.FINE
    yield Line("machine", "system", f"{machine.system} {machine.release}, {machine.architecture}", state, said)
    cores = f", {machine.gpu_cores} GPU cores" if machine.gpu_cores else ""
    yield Line("machine", "chip", machine.chip + cores)
    yield Line("machine", "memory", amount(machine.memory_bytes))
    yield Line("machine", "Python", machine.python)
    yield _guarded("MLX runs on", _mlx_device)
    yield _guarded("memory for MLX", _mlx_memory)
    yield _guarded("PyTorch runs on", _torch_device)


def of_packages(machine: Machine, versions: dict[str, str | None]) -> Iterator[Line]:
    """What is installed, with what is known to be wrong with it on this machine."""
    said = doubts(machine, versions)
    for name, version in versions.items():
        state = State.DOUBT if said[name] else State.FINE
        yield Line("packages", name, version or "missing", state, tuple(said[name]))


def beside_comfyui() -> list[Path]:
    """Where ComfyUI keeps this pack's models, if the pack is one of its custom nodes."""
    custom_nodes = Path(__file__).parents[3]
    folder = custom_nodes.parent / "models" / "llada2"
    return [folder] if custom_nodes.name == "custom_nodes" and folder.is_dir() else []


def _of_models(roots: Iterable[Path]) -> Iterator[Line]:
    yield from _of_model("built in (Shapes)", BUILT_IN)
    try:
        found = hub.cached(HUB_MODEL)
    except LLaDA2Error as error:
        yield Line("models", HUB_MODEL, "cannot be read", State.DOUBT, (str(error),))
    else:
        if found is None:
            yield Line("models", HUB_MODEL, "not on this machine")
        else:
            yield from _of_model(HUB_MODEL, found)
    folders, problems = model_folders(roots)
    for problem in problems:
        yield Line("models", "a folder", "cannot be read", State.DOUBT, (problem,))
    for name, folder in sorted(folders.items()):
        yield from _of_model(name, folder)


def _of_model(name: str, folder: Path) -> Iterator[Line]:
    """Which parts are there, and how the language model would run."""
    checkpoint = Checkpoint(folder)
    states = {part: checkpoint.state(part) for part in TOLD}
    damaged = tuple(
        f"{part.value}: {state}."
        for part, state in states.items()
        if not state.startswith(COMPLETE) and not _absent(state)
    )
    there = [part.value for part, state in states.items() if state.startswith(COMPLETE)]
    lacking = [part.value for part, state in states.items() if _absent(state)]
    value = f"has {', '.join(there) or 'no complete part'}" + (f"; lacks {', '.join(lacking)}" if lacking else "")
    yield Line("models", name, value, State.DOUBT if damaged else State.FINE, damaged)
    if states[Part.BACKBONE].startswith(COMPLETE):
        yield _guarded(f"{name}, precision", lambda: _precision(checkpoint), section="models")


def _absent(state: str) -> bool:
    return state.startswith("missing ")


def _precision(checkpoint: Checkpoint) -> tuple[str, tuple[str, ...]]:
    from ..backbone.handle import Backbone

    backbone = Backbone(checkpoint)
    told = f"{backbone.precision}, {amount(backbone.size)}"
    return told, (backbone.reason,) if backbone.reason else ()


def _mlx_device() -> tuple[str, tuple[str, ...]]:
    import mlx.core as mx

    gpu = mx.default_device().type == mx.DeviceType.gpu
    return ("the GPU" if gpu else "the CPU"), ()


def _mlx_memory() -> tuple[str, tuple[str, ...]]:
    import mlx.core as mx

    from ..backbone.precision import machine_bytes

    metal = "recommended by Metal" if mx.metal.is_available() else "three quarters of what there is"
    return f"{amount(machine_bytes())}, {metal}", ()


def _torch_device() -> tuple[str, tuple[str, ...]]:
    import torch

    from ..imaging.device import default_device

    device = default_device()
    built = torch.backends.mps.is_built() and device.type == "cpu"
    note = "This PyTorch could use the GPU (MPS), and says that there is none. Start Python in a session with a screen, or update PyTorch."
    return device.type, (note,) if built else ()


def _guarded(name: str, find: Any, section: str = "machine") -> Line:
    """A line of ``find() -> (value, notes)``; where a package fails, the line says so."""
    try:
        value, notes = find()
    except Exception as error:  # whatever a package that is missing or broken raises
        failed = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return Line(section, name, "cannot be said", State.DOUBT, (failed,))
    return Line(section, name, value, State.FINE, notes)
