"""How fast a machine draws, reads and decodes, and what that takes: figures for a report, the same in Markdown and JSON."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from .. import __version__, tasks
from ..backbone.acceptance import Sampling
from ..backbone.denoising import DENOISING
from ..backbone.session import Report
from ..checkpoint.layout import Checkpoint, Part
from ..checkpoint.sizes import DEFAULT_DRAWING, ENCODED_PIXELS
from ..progress import OnStep, Progress, amount, ignore
from ..vq import VQGrid
from .machine import Machine, installed, this_machine

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ..backbone.handle import Backbone
    from ..imaging.flow import DecodeOptions

T = TypeVar("T")

PROMPT = "A large red circle in the top left and a small blue star in the bottom right, on a plain white background"
QUESTION = "How many shapes are there?"
# The largest side, in pixels, that is drawn and shown unless another is asked for: minutes, not hours, on any Mac.
LARGEST = 512
ANSWER = 64  # tokens at most
# Engines of the decoder, as a person reads them.
NAMES = {"torch": "PyTorch", "mlx": "MLX", "mlx-8bit": "MLX with 8 bits"}
# A stage runs up to so many times, as long as its runs together have taken less than this, in seconds.
RUNS, PATIENCE = 3, 20.0


@dataclass
class Stage:
    """One stage and what it took.

    Args:
        name: "draw", "understand", "encode", "decode", "pixels".
        what: what was asked for.
        seconds: of the median run, reading the weights not included; ``runs`` are all of them.
        loading: seconds for reading the weights; None where they were there.
        steps: denoising steps, or network calls; None where a stage has none.
        step_seconds: the median time of one.
        positions: that went through the language model.
        engine: what a decoder ran in; None for other stages.
        mlx_peak: the most bytes that MLX had in use at once, weights included; None where it takes no part.
        torch_peak: the same of PyTorch; on MPS, which counts no peak, the most that it had at the end of a step. None on a CPU.
    """

    name: str
    what: str
    seconds: float
    runs: list[float]
    loading: float | None = None
    steps: int | None = None
    step_seconds: float | None = None
    positions: int | None = None
    engine: str | None = None
    mlx_peak: int | None = None
    torch_peak: int | None = None


@dataclass
class Figures:
    """All that a run of the benchmark found. ``process_peak`` is the most memory that the process had, in bytes."""

    model: str
    precision: str
    weight_bytes: int
    mlx_device: str
    torch_device: str
    machine: Machine
    packages: dict[str, str | None]
    stages: list[Stage] = field(default_factory=list)
    process_peak: int = 0
    version: str = __version__

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Clock:
    """An ``OnStep`` that notes when each step of each phase ended, and the most that ``count`` gave; then it tells ``on_step``.

    Args:
        count: bytes in use; is called at each step.
    """

    def __init__(self, on_step: OnStep = ignore, count: Callable[[], int] = lambda: 0):
        self._on_step, self._count = on_step, count
        self.steps: dict[str, list[float]] = {}
        self.most, self._last = 0, time.perf_counter()

    def __call__(self, progress: Progress) -> None:
        now = time.perf_counter()
        self.steps.setdefault(progress.phase, []).append(now - self._last)
        self.most = max(self.most, self._count())
        self._on_step(progress)
        self._last = time.perf_counter()


def measure(
    checkpoint: Checkpoint,
    backbone: Backbone,
    part: Part,
    options: DecodeOptions,
    device: torch.device | None = None,
    side: int = 0,
    name: str = "",
    on_step: OnStep = ignore,
    runs: int = RUNS,
    engine: str = "torch",
) -> Figures:
    """Run every stage, the parts one after the other in memory: encode, draw and understand, decode, pixels.

    Args:
        part: ``Part.DECODER`` or ``Part.DECODER_TURBO``.
        options: of the decoder.
        device: where PyTorch runs; the library's choice if None.
        side: of the drawn and of the shown picture, in pixels; 0 is the model's own, ``LARGEST`` at most.
        name: of the model.
        on_step: called while it works; what it raises ends that.
        runs: how often a stage runs at most, see ``RUNS``.
        engine: of the decoder, see ``engine.plan``.

    Raises:
        RequestError: the size has no size token.
        LLaDA2Error: what the stages raise.
    """
    import mlx.core as mx

    from ..imaging.device import default_device

    device = device or default_device()
    side = side or min(checkpoint.image_sizes.drawing or DEFAULT_DRAWING, LARGEST)
    tasks.grid_size(backbone, side, side)  # says what is wrong with the size before the work
    mlx_device = "GPU" if mx.default_device().type == mx.DeviceType.gpu else "CPU"
    found = Figures(name, backbone.precision, backbone.size, mlx_device, device.type, this_machine(), installed())
    imaging = _Imaging(checkpoint, device, on_step, runs, found.stages)
    seen = imaging.encode(side)
    drawn = _write(backbone, side, seen, on_step, runs, found.stages)
    backbone.unload()  # makes room for the decoder
    imaging.pixels(imaging.decode(part, engine, drawn, options))
    found.process_peak = _process_peak()
    return found


def _write(backbone: Backbone, side: int, seen: VQGrid, on_step: OnStep, runs: int, stages: list[Stage]) -> VQGrid:
    """The stages of the language model; returns what was drawn."""
    import mlx.core as mx

    _, loading = _timed(lambda: backbone.load(on_step))
    mx.reset_peak_memory()
    clock = Clock(on_step)
    draw = lambda: tasks.text_to_vq(backbone, PROMPT, side, side, sampling=Sampling(steps=8), on_step=clock)
    drawing, took = _repeated(draw, runs)
    told = f"{side} x {side} pixels, {drawing.grid.codes.size} codes, guidance 2"
    stages.append(_of_language("draw", told, took, loading, drawing.report, clock))

    mx.reset_peak_memory()
    clock = Clock(on_step)
    ask = lambda: tasks.understand(backbone, seen, QUESTION, ANSWER, Sampling(steps=32), on_step=clock)
    answer, took = _repeated(ask, runs)
    told = f"{seen.codes.size} codes, an answer of {len(answer.ids)} tokens"
    stages.append(_of_language("understand", told, took, None, answer.report, clock))
    return drawing.grid


def _of_language(name: str, what: str, took: list[float], loading: float | None, report: Report, clock: Clock) -> Stage:
    import mlx.core as mx

    each, peak = statistics.median(clock.steps[DENOISING]), mx.get_peak_memory()
    return Stage(
        name, what, statistics.median(took), took, loading, report.steps, each, report.positions, mlx_peak=peak
    )


class _Imaging:
    """The stages beside the language model. Each loads its part, and lets it go."""

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, on_step: OnStep, runs: int, stages: list[Stage]
    ) -> None:
        self.checkpoint, self.device, self.on_step, self.runs, self.stages = checkpoint, device, on_step, runs, stages

    def encode(self, side: int) -> VQGrid:
        """A picture of ``side`` pixels to be asked about."""
        from ..imaging.prepare import Purpose

        picture = _picture(side)
        return self._run(
            "encode",
            Part.IMAGE_TOKENIZER,
            lambda tokenizer, clock: tokenizer.encode(picture, Purpose.UNDERSTAND),
            lambda grid: (
                f"{grid.width * ENCODED_PIXELS} x {grid.height * ENCODED_PIXELS} pixels, {grid.codes.size} codes"
            ),
        )

    def decode(self, part: Part, engine: str, grid: VQGrid, options: DecodeOptions) -> torch.Tensor:
        """The latents of a grid, by a decoder in an engine."""
        from ..imaging.engine import plan

        engine = plan(self.checkpoint, part, engine, [grid], options, self.device).engine
        told = f"{part.value} in {NAMES[engine]}, {options.steps} steps, guidance {options.guidance:g}, "
        latents = self._run(
            "decode",
            part,
            lambda decoder, clock: decoder.sample([grid], options, clock),
            lambda latents: told + _pixels(latents),
            engine,
        )
        stage, calls = self.stages[-1], options.network_calls
        stage.steps, stage.step_seconds = calls, stage.seconds / calls if calls else None
        return latents

    def pixels(self, latents: torch.Tensor) -> None:
        """The picture of latents."""
        self._run("pixels", Part.VAE, lambda vae, clock: vae.decode(latents, clock), lambda _: _pixels(latents))

    def _run(
        self,
        name: str,
        part: Part,
        work: Callable[[Any, Clock], T],
        told: Callable[[T], str],
        engine: str | None = None,
    ) -> T:
        import mlx.core as mx

        from ..imaging import load_part

        in_mlx = engine not in (None, "torch")
        load = lambda: load_part(self.checkpoint, part, self.device, self.on_step, engine or "torch")
        loaded, loading = _timed(load)
        memory = _TorchMemory(self.device)
        mx.reset_peak_memory()
        clock = Clock(self.on_step, memory.now)
        result, took = _repeated(lambda: work(loaded, clock), self.runs)
        stage = Stage(name, told(result), statistics.median(took), took, loading, engine=engine)
        if in_mlx:
            stage.mlx_peak = mx.get_peak_memory()
            loaded.unload()
        else:
            stage.torch_peak = memory.peak(clock)
        self.stages.append(stage)
        return result


def _pixels(latents: torch.Tensor) -> str:
    height, width = (side * 8 for side in latents.shape[-2:])
    return f"{width} x {height} pixels"


def to_markdown(figures: Figures) -> str:
    """A block to paste into an issue."""
    machine, packages = figures.machine, figures.packages
    cores = f", {machine.gpu_cores} GPU cores" if machine.gpu_cores else ""
    versions = ", ".join(f"{name} {version}" for name, version in packages.items())
    lines = [
        f"**{machine.chip}{cores}, {amount(machine.memory_bytes)}, {machine.system} {machine.release}**",
        "",
        f"{figures.model}, {figures.precision} ({amount(figures.weight_bytes)}); MLX on the {figures.mlx_device}, PyTorch on "
        f"{figures.torch_device}; llada2-mlx {figures.version}, Python {machine.python}, {versions}",
        "",
        "| stage | what | seconds | read in | steps | seconds a step | MLX peak | PyTorch peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for stage in figures.stages:
        cells = [
            stage.name,
            stage.what,
            f"{stage.seconds:.2f}",
            _or_nothing(stage.loading, lambda value: f"{value:.1f} s"),
            _or_nothing(stage.steps, str),
            _or_nothing(stage.step_seconds, lambda value: f"{value:.3f}"),
            _or_nothing(stage.mlx_peak, amount),
            _or_nothing(stage.torch_peak, amount),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"The most that the process had in memory: {amount(figures.process_peak)}."])


def _or_nothing(value: T | None, told: Callable[[T], str]) -> str:
    return "" if value is None else told(value)


def _timed(function: Callable[[], T]) -> tuple[T, float]:
    began = time.perf_counter()
    return function(), time.perf_counter() - began


def _repeated(function: Callable[[], T], runs: int) -> tuple[T, list[float]]:
    """The last result, and the seconds of each run."""
    took: list[float] = []
    while not took or (len(took) < runs and sum(took) < PATIENCE):
        result, seconds = _timed(function)
        took.append(seconds)
    return result, took


def _picture(side: int) -> Image.Image:
    """A square picture of a disc and a square on a light ground."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (side, side), (238, 222, 190))
    pen = ImageDraw.Draw(image)
    at = lambda *parts: tuple(round(side * part) for part in parts)
    pen.ellipse(at(0.06, 0.06, 0.44, 0.44), fill=(214, 30, 40))
    pen.rectangle(at(0.6, 0.6, 0.92, 0.92), fill=(30, 70, 210))
    return image


class _TorchMemory:
    """What PyTorch has in memory on a device from now on, as far as that counts it."""

    def __init__(self, device: torch.device):
        import torch

        self.kind = device.type
        if self.kind == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def now(self) -> int:
        """Bytes that MPS has taken; 0 elsewhere."""
        import torch

        return torch.mps.driver_allocated_memory() if self.kind == "mps" else 0

    def peak(self, clock: Clock) -> int | None:
        """The most so far; where nothing is counted but at each step, the most that ``clock`` saw."""
        import torch

        if self.kind == "cuda":
            return torch.cuda.max_memory_allocated()
        return max(clock.most, self.now()) if self.kind == "mps" else None


def _process_peak() -> int:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
