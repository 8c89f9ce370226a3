"""What the commands of ``llada2-mlx`` do, each with the arguments that ``cli`` reads for it."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__, prompts
from .checkpoint.codebook import doubt, require_same
from .checkpoint.hub import is_id
from .checkpoint.layout import BUILT_IN, COMPLETE, TOLD, Checkpoint, Part, resolve
from .checkpoint.sizes import DEFAULT_DRAWING
from .errors import RequestError
from .files import holds_nothing, replacing
from .progress import OnStep, Progress
from .vq import GridSet, Pictures, VQGrid, grids_of, picture_seed

if TYPE_CHECKING:
    from PIL import Image

    from . import tasks
    from .backbone.acceptance import Sampling
    from .backbone.handle import Backbone
    from .backbone.session import Report
    from .backbone.sprint import Sprint
    from .imaging.decoder import LatentDecoder
    from .imaging.flow import DecodeOptions

# the words of the command line for what the library calls so; the library itself is imported when it is needed
SAMPLERS = {"ode": "ODE", "published": "as published"}
PRESETS = {"custom": "custom", "published": "as published", "balanced": "balanced", "fast": "fast"}
# what a preset decides, as it is without one; the decoder decides the steps
WAY = {"sampler": "ode", "solver": "euler", "time_shift": 6.0, "guidance_start": 0.0, "guidance_end": 1.0}
DECODERS = {"full": (Part.DECODER, 50), "turbo": (Part.DECODER_TURBO, 8)}
PARTS = {part.word: part for part in Part}
ENGINES = ("auto", "torch", "mlx", "mlx-8bit")
ALL_TASKS = [name for name, part in PARTS.items() if part is not Part.DECODER]  # the turbo decoder is the default
SEEING = {"picture": prompts.Seeing.PICTURE, "before": prompts.Seeing.BEFORE}
PURPOSES = {
    "understand": "understand",
    "understand-with-others": "understand with others",
    "edit": "edit",
    "edit-published": "edit as published",
}
RANKS = {
    "confidence": "low confidence",
    "margin": "top-k margin",
    "entropy": "negative entropy",
    "random": "random",
}

VERDICTS = {
    True: "This machine computes what it should.",
    False: "This machine does NOT compute what it should: see the lines that begin with an exclamation mark, and report them.",
}


class FilePath(str):
    """A path as it was typed: what a picture's parameters keep only the name of."""


def t2i(a: argparse.Namespace) -> None:
    """Draw a picture."""
    from . import tasks
    from .backbone.guidance import Guidance

    prompts.require_text(a.prompt, "prompt")
    tasks.require_pictures(a.pictures)
    tasks.require_multiples(a.width, a.height)
    _check_outputs(a, a.pictures)
    for path in _numbered(a.codes, a.pictures) if a.codes else ():
        _writable(path, ".safetensors")
    Guidance.simple(a.guidance, a.rescale)
    options, sampling, sprint = _decode_options(a), _sampling(a), _sprint(a)
    thinking = tasks.Thinking(a.thinking_steps, a.thinking_length, a.thinking_temperature) if a.thinking else None
    checkpoint = _resolve(a, Part.BACKBONE, *_decoder_parts(a))
    _check_decoder(a, checkpoint)
    size, backbone = {"width": a.width, "height": a.height}, _backbone(a, checkpoint)
    _warn(backbone.tokens.doubt(a.prompt))
    with _Bars() as on_step:
        guided = {"guidance": a.guidance, "rescale": a.rescale, "sampling": sampling}
        more = {"thinking": thinking, "sprint": sprint, "pictures": a.pictures}
        drawing = tasks.text_to_vq(backbone, a.prompt, **size, **guided, **more, on_step=on_step)
    if drawing.reasoning:
        print(drawing.reasoning)
    doubts = (checkpoint.image_sizes.doubt_grid("drawing", grid) for grid in drawing.grids)
    _warn(*drawing.warnings, *dict.fromkeys(doubts))
    if a.codes:
        for grid, path in zip(drawing.grids, _numbered(a.codes, a.pictures), strict=True):
            grid.save(path)
    _save_confidence(a, drawing)
    backbone.unload()  # makes room for the decoder
    _decode(a, checkpoint, drawing.grids, options)
    _tell(drawing.report)


def understand(a: argparse.Namespace) -> None:
    """Answer a question about a picture, or about several."""
    from . import tasks
    from .backbone.denoising import require_length

    prompts.require_text(a.question, "question")
    require_length(a.max_new_tokens)
    _check_encoding(a)
    sampling, sprint = _sampling(a), _sprint(a)
    images = [_open(path) for path in (a.image, *a.others)]
    checkpoint = _resolve(a, Part.BACKBONE, Part.IMAGE_TOKENIZER)
    backbone = _backbone(a, checkpoint)
    pictures = _codes(a, checkpoint, _understanding(images), images)
    _warn(backbone.tokens.doubt(a.question))
    with _Bars() as on_step:
        answer = tasks.understand(
            backbone, pictures, a.question, a.max_new_tokens, sampling, on_step=on_step, sprint=sprint
        )
    print(answer.text)
    _tell(answer.report)


def chat(a: argparse.Namespace) -> int:
    """Talk with the model, also about pictures; /help says how."""
    from .backbone.denoising import require_length
    from .chat import Conversation
    from .terminal import Terminal

    require_length(a.max_new_tokens)
    _check_encoding(a)
    sampling, sprint = _sampling(a), _sprint(a)
    images = [_open(path) for path in a.image]
    checkpoint = _resolve(a, Part.BACKBONE)
    backbone, interactive = _backbone(a, checkpoint), sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  input() then has lines that can be edited and called again
    terminal = Terminal(
        backbone,
        _open,
        lambda images: _codes(a, _resolve(a, Part.IMAGE_TOKENIZER), _understanding(images), images),
        lambda: _Bars(hidden=frozenset({"denoising"})),
        Conversation(a.system),
        sampling,
        a.max_new_tokens,
        sprint,
        interactive,
        images=images,
    )
    if checkpoint.world:
        _warn(
            f"{checkpoint.root.name} is a toy that knows {checkpoint.world}, and has not learned to talk: its answers mean nothing."
        )
    terminal.run()
    return 1 if terminal.failures else 0


def edit(a: argparse.Namespace) -> None:
    """Change a picture as an instruction says, which may refer to other pictures."""
    from . import tasks
    from .backbone.guidance import Guidance

    prompts.require_text(a.instruction, "instruction")
    _writable(a.output, ".png")
    Guidance.editing(a.guidance, a.image_guidance, a.rescale)
    _check_encoding(a)
    options, sampling, sprint = _decode_options(a), _sampling(a), _sprint(a)
    images = [_open(path) for path in (*a.others, a.image)]
    checkpoint = _resolve(a, Part.BACKBONE, Part.IMAGE_TOKENIZER, *_decoder_parts(a))
    _check_decoder(a, checkpoint)
    backbone = _backbone(a, checkpoint)
    pictures = _codes(a, checkpoint, "edit-published" if a.published_crop else "edit", images)
    _warn(backbone.tokens.doubt(a.instruction))
    with _Bars() as on_step:
        guided = {"text_guidance": a.guidance, "image_guidance": a.image_guidance, "rescale": a.rescale}
        drawing = tasks.edit(
            backbone, pictures, a.instruction, **guided, sampling=sampling, on_step=on_step, sprint=sprint
        )
    _warn(*drawing.warnings)
    backbone.unload()  # makes room for the decoder
    _decode(a, checkpoint, drawing.grids, options)
    _tell(drawing.report)


def redraw(a: argparse.Namespace) -> None:
    """Draw a part of a picture anew: what a mask covers. All other codes are kept."""
    import numpy as np

    from . import tasks
    from .grids import cells, grown, require_covered, require_growth, require_threshold

    require_threshold(a.mask_threshold)
    require_growth(a.mask_grow)
    mask = np.asarray(_open(a.mask).convert("L")) / 255
    mask = 1 - mask if a.invert_mask else mask
    require_covered([mask])
    covered = lambda height, width: grown(cells(mask, height, width, a.mask_threshold), a.mask_grow)

    def draw(backbone: Backbone, grid: VQGrid, **options: object) -> tasks.Drawing:
        return tasks.redraw(backbone, grid, covered(grid.height, grid.width), a.text, **options)

    _redraw(a, draw, lambda height, width: require_covered([covered(height, width)]))


def grow(a: argparse.Namespace) -> None:
    """Draw what is around a picture. All of its codes are kept."""
    from . import tasks
    from .grids import require_added

    sides = {"left": a.left, "top": a.top, "right": a.right, "bottom": a.bottom}
    require_added(**sides)
    _redraw(a, lambda backbone, grid, **options: tasks.grow(backbone, grid, a.text, **sides, **options))


def _redraw(
    a: argparse.Namespace,
    draw: Callable[..., tasks.Drawing],
    check: Callable[[int, int], None] = lambda height, width: None,
) -> None:
    """A picture, or codes that were saved, drawn in part by ``draw(backbone, grid, ...)``.

    Args:
        check: raises ``RequestError`` where a grid of so many codes cannot be drawn in part; called as soon as its size is known.
    """
    from . import tasks
    from .imaging.prepare import PATCH, Purpose, prepare_for

    prompts.require_text(a.text, "text")
    _check_outputs(a)
    tasks.redraw_guidance(SEEING[a.seeing], a.guidance, a.image_guidance, a.rescale)
    _check_encoding(a)
    options, sampling = _decode_options(a), _sampling(a)
    saved = VQGrid.load(a.image) if Path(a.image).suffix.lower() == ".safetensors" else None
    if saved is not None:
        check(saved.height, saved.width)
    image = _open(a.image) if saved is None else None
    checkpoint = _resolve(a, Part.BACKBONE, *([Part.IMAGE_TOKENIZER] if image else []), *_decoder_parts(a))
    _check_decoder(a, checkpoint, *([saved] if saved else []))
    if image is not None:
        width, height = prepare_for(checkpoint.image_sizes, image, Purpose.EDIT, a.size).size
        check(height // PATCH, width // PATCH)
    backbone = _backbone(a, checkpoint)
    grid = _codes(a, checkpoint, "edit", [image]) if saved is None else saved
    _warn(backbone.tokens.doubt(a.text))
    with _Bars() as on_step:
        guided = {"guidance": a.guidance, "image_guidance": a.image_guidance, "rescale": a.rescale}
        drawing = draw(backbone, grid, seeing=SEEING[a.seeing], **guided, sampling=sampling, on_step=on_step)
    _warn(checkpoint.image_sizes.doubt_grid("drawing", drawing.grid))
    _save_confidence(a, drawing)
    backbone.unload()  # makes room for the decoder
    _decode(a, checkpoint, drawing.grids, options)
    _tell(drawing.report)


def story(a: argparse.Namespace) -> None:
    """Tell a story in words and pictures, into a folder with a page to look at."""
    from . import story as stories

    prompts.require_text(a.prompt, "prompt")
    stories.require_limits(a.pictures, a.text_length)
    stories.guidances(a.text_guidance, a.image_guidance, a.rescale)
    options, sampling = _decode_options(a), _sampling(a)
    stories.text_sampling(sampling, a.text_steps, a.text_temperature)
    folder = _empty_folder(a.output)
    checkpoint = _resolve(a, Part.BACKBONE, *_decoder_parts(a))
    _check_decoder(a, checkpoint)
    backbone = _backbone(a, checkpoint)
    _warn(backbone.tokens.doubt(a.prompt))

    so_far = ""

    def write(text: str) -> None:
        nonlocal so_far
        so_far = text

    def keep(number: int, grid: VQGrid) -> None:
        folder.mkdir(exist_ok=True)
        grid.save(folder / stories.picture_name(number, ".safetensors"))
        _write(folder / "story.md", f"{so_far}\n\n{stories.picture_link(number)}\n")

    with _Bars() as on_step:
        limits = {"pictures": a.pictures, "codes": a.picture_codes, "text": a.text_length}
        guided = {"text_guidance": a.text_guidance, "image_guidance": a.image_guidance, "rescale": a.rescale}
        writing = {"text_steps": a.text_steps, "text_temperature": a.text_temperature}
        calls = {"on_step": on_step, "on_text": write, "on_picture": keep}
        told = stories.tell(backbone, a.prompt, **limits, **guided, **writing, sampling=sampling, **calls)
    folder.mkdir(exist_ok=True)
    _write(folder / "story.md", told.markdown + "\n")
    _warn(*told.warnings)
    backbone.unload()  # makes room for the decoder
    paths = [str(folder / stories.picture_name(number)) for number in range(1, len(told.grids) + 1)]
    if told.grids:
        _decode_each(a, checkpoint, told.grids, options, paths)
    _write(folder / "index.html", stories.to_html(told.parts, prompts.trim(a.prompt)))
    print(f"{folder / 'index.html'}: {len(told.texts)} texts, {len(told.grids)} pictures")
    _tell(told.report)


def encode(a: argparse.Namespace) -> None:
    """Turn a picture into codes."""
    _writable(a.output, ".safetensors")
    _check_encoding(a)
    image = _open(a.image)
    (grid,) = grids_of(_codes(a, _resolve(a, Part.IMAGE_TOKENIZER), a.purpose, [image]))
    grid.save(a.output)
    print(f"{a.output}: {grid}")


def decode(a: argparse.Namespace) -> None:
    """Turn codes into a picture."""
    _writable(a.output, ".png")
    grid, options = VQGrid.load(a.codes), _decode_options(a)
    checkpoint = _resolve(a, *_decoder_parts(a))
    _check_decoder(a, checkpoint, grid)
    _decode(a, checkpoint, (grid,), options)


def look(a: argparse.Namespace) -> None:
    """Show codes without decoding them: a square of one colour for each."""
    from PIL import Image

    from .imaging import look as looking

    _writable(a.output, ".png")
    looking.require_scale(a.pixels)
    grid, checkpoint = VQGrid.load(a.codes), _resolve(a, Part.IMAGE_TOKENIZER)
    picture = Image.fromarray(looking.look_at(grid, checkpoint, scale=a.pixels))
    with replacing(Path(a.output)) as partial:
        picture.save(partial, format="PNG")
    print(f"{a.output}: {picture.width} x {picture.height} pixels")


def download(a: argparse.Namespace) -> None:
    """Get a model from the hub, or the rest of one; check what is there, get what is damaged again, and say where it is."""
    parts = list(PARTS.values()) if "all" in a.parts else [PARTS[name] for name in a.parts]
    if a.bits is None:
        with _Bars() as on_step:
            print(resolve(a.model, *parts, on_step=on_step, verify=True, published=True).root)
        return
    from .backbone.fetch import fetch_copy

    if os.path.isdir(os.path.expanduser(a.model)) or not is_id(a.model):
        raise RequestError(
            f"{a.model} is no hub id, and only a hub model is converted while it is downloaded. A folder is converted "
            f"with: llada2-mlx convert {a.model} COPY --bits {a.bits}"
        )
    if Part.BACKBONE not in parts:
        raise RequestError("--bits is about the language model: name backbone among the --parts, or leave --bits out.")
    with _Bars() as on_step:
        fetch_copy(a.model, a.bits, on_step, later=[part for part in parts if part is not Part.BACKBONE])
    print(_resolve(a, *parts, verify=True).root)


def info(a: argparse.Namespace) -> None:
    """Say what a model folder holds."""
    checkpoint = _resolve(a)
    print(f"folder: {checkpoint.root}")
    states = {part: checkpoint.state(part) for part in TOLD}
    for part, state in states.items():
        print(f"{part.value}: {state}")
    if states[Part.BACKBONE].startswith(COMPLETE):
        backbone = _backbone(a, checkpoint)
        print(f"weights: {backbone.size / 1e9:.2f} GB as {backbone.precision}")
        side = checkpoint.image_sizes.drawing or DEFAULT_DRAWING
        print(f"draws: {side} x {side} pixels unless told otherwise")
        print(json.dumps(asdict(backbone.config), indent=1))


def doctor(a: argparse.Namespace) -> int:
    """Say what this machine is, what is known to be wrong with its packages, and whether it computes what it should."""
    from .checkup import doctor

    found, section = [], ""
    for line in doctor.examine([*map(Path, a.models), *doctor.beside_comfyui()], _device(a)):
        found.append(line)
        if a.json:
            continue
        if line.section != section:
            print(f"{line.section}:")
        section = line.section
        print(line, flush=True)
    said = doctor.as_json(found)
    print(json.dumps(said, indent=1) if a.json else VERDICTS[said["ok"]])
    return 0 if said["ok"] else 1


def bench(a: argparse.Namespace) -> None:
    """Measure every stage on this machine, and print figures to paste into an issue."""
    from . import tasks
    from .checkup import bench

    if a.json:
        _writable(a.json, ".json")
    tasks.require_multiples(a.size, a.size)
    options = _decode_options(a)
    checkpoint = _resolve(a, Part.BACKBONE, Part.IMAGE_TOKENIZER, *_decoder_parts(a))
    _check_decoder(a, checkpoint)
    backbone = _backbone(a, checkpoint)
    part, device, name = DECODERS[a.decoder][0], _device(a), _name(a.model)
    with _Bars() as on_step:
        figures = bench.measure(checkpoint, backbone, part, options, device, a.size, name, on_step, a.runs, a.engine)
    if a.json:
        _write(Path(a.json), json.dumps(figures.as_json(), indent=1))
    print(bench.to_markdown(figures))


def demo(a: argparse.Namespace) -> None:
    """Draw, ask and edit, into a folder with a page to look at."""
    from .shapes import gallery
    from .shapes.studio import Studio

    folder = _folder(a.folder)
    gallery.make(folder, Studio(_resolve(a, *Part)))
    if a.model == str(BUILT_IN):
        print("This is Shapes, the toy that is built in; it knows flat shapes in four places, and no other words.")


def convert(a: argparse.Namespace) -> None:
    """Write a smaller copy of a model: its language model with few bits, its decoders too if asked, the rest linked."""
    from .backbone.convert import add_parts, convert, is_current, require_place
    from .checkpoint.copies import state_of
    from .imaging.decoder import decoder_folder
    from .imaging.decoder_copy import convert_decoder
    from .worker import MLXWorker

    copy = Checkpoint(Path(a.destination).absolute())
    if state_of(copy.root) is None:  # a copy may be the one that is wanted: that can be told when the source is here
        require_place(copy.root)
    source, worker = _resolve(a, Part.BACKBONE), MLXWorker()
    with _Bars() as on_step:
        if not is_current(copy.root, source, a.bits, a.group_size):
            worker.drive(convert(source, copy.root, a.bits, a.group_size), on_step)
        for part in (Part.DECODER, Part.DECODER_TURBO) if a.decoder_bits == 8 else ():
            if not source.missing(part):
                worker.drive(
                    convert_decoder(source.root / decoder_folder(part), copy.root / decoder_folder(part)), on_step
                )
        worker.drive(add_parts(source, copy.root), on_step)
    print(f"{a.destination}: {sum(path.stat().st_size for path in copy.files(Part.BACKBONE)) / 1e9:.2f} GB")
    if absent := [part.value for part in TOLD if copy.missing(part)]:
        print(f"It has no {', '.join(absent)}, because {a.model} has none here. Get that, and call this again.")


class _Bars:
    """Progress bars, one a phase: an ``OnStep`` to use in a ``with`` block.

    Args:
        hidden: phases that show none.
    """

    def __init__(self, hidden: frozenset[str] = frozenset()):
        self.hidden = hidden

    def __enter__(self) -> _Bars:
        self.phase, self.bar = None, None
        return self

    def __call__(self, progress: Progress) -> None:
        from tqdm import tqdm

        if self.phase != progress.phase:
            self._close()
            self.phase, self.bar = progress.phase, None
        if progress.phase in self.hidden:
            return
        if self.bar is None:
            unit = {"unit": "B", "unit_scale": True} if progress.in_bytes else {}
            self.bar = tqdm(total=progress.total, desc=progress.phase, leave=False, disable=None, **unit)
        self.bar.total = progress.total
        self.bar.update(progress.done - self.bar.n)

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _resolve(a: argparse.Namespace, *parts: Part, verify: bool = False) -> Checkpoint:
    precision = getattr(a, "precision", "auto")
    with _Bars() as on_step:
        if Part.BACKBONE in parts and precision.endswith("bit"):
            from .backbone.fetch import fetch_copy, needs_fetching
            from .backbone.precision import BITS

            if needs_fetching(a.model, precision):
                fetch_copy(
                    a.model, BITS[precision], on_step, later=[part for part in parts if part is not Part.BACKBONE]
                )
        return resolve(a.model, *parts, on_step=on_step, verify=verify)


def _backbone(a: argparse.Namespace, checkpoint: Checkpoint) -> Backbone:
    from .backbone.handle import Backbone
    from .backbone.precision import BITS

    backbone = Backbone(checkpoint, a.precision)
    if backbone.reason and backbone.precision in BITS:  # the weights are not used as they are
        print(f"llada2-mlx: {backbone.reason}", file=sys.stderr)
    return backbone


def _check_encoding(a: argparse.Namespace) -> None:
    """Say before the model is fetched what is wrong with how pictures are to be encoded."""
    from .imaging.prepare import require_side

    _device(a)
    require_side(a.size)


def _codes(a: argparse.Namespace, checkpoint: Checkpoint, purpose: str, images: Sequence[Image.Image]) -> Pictures:
    """The picture as codes, or a set of several in their order."""
    from .imaging import load_part
    from .imaging.prepare import Purpose, use_of

    wanted = Purpose(PURPOSES[purpose])
    tokenizer = load_part(checkpoint, Part.IMAGE_TOKENIZER, _device(a))
    grids = [tokenizer.encode(image, wanted, a.size) for image in images]
    pictures = GridSet(tuple(grids)) if len(grids) > 1 else grids[0]
    _warn(doubt(pictures, checkpoint, use_of(wanted)))
    return pictures


def _understanding(pictures: Sequence) -> str:
    """The purpose of pictures that are asked about together."""
    return "understand-with-others" if len(pictures) > 1 else "understand"


def _warn(*doubts: str | None) -> None:
    for sentence in doubts:
        if sentence is not None:
            print(f"llada2-mlx: warning: {sentence}", file=sys.stderr)


def _decode(a: argparse.Namespace, checkpoint: Checkpoint, grids: Sequence[VQGrid], options: DecodeOptions) -> None:
    from .imaging import load_part
    from .imaging.pixels import to_images

    paths, several = _numbered(a.output, len(grids)), len(grids) > 1
    if len({grid.codes.shape for grid in grids}) > 1:  # each plan may choose a size
        _decode_each(a, checkpoint, grids, options, paths)
        return
    with _Bars() as on_step:
        latents = _decoder(a, checkpoint, grids, options, on_step).sample(grids, options, on_step)
        pixels = load_part(checkpoint, Part.VAE, _device(a), on_step).decode(latents, on_step)
    for number, (image, path) in enumerate(zip(to_images(pixels), paths, strict=True), 1):
        _save_picture(a, image, path, options, **({"picture": number} if several else {}))


def _decoder(
    a: argparse.Namespace, checkpoint: Checkpoint, grids: Sequence[VQGrid], options: DecodeOptions, on_step: OnStep
) -> LatentDecoder:
    """The decoder in its engine; says why, where that was chosen for this machine."""
    from .imaging.engine import open_decoder, plan

    part, largest = DECODERS[a.decoder][0], sorted(grids, key=lambda grid: grid.codes.size, reverse=True)
    chosen = plan(checkpoint, part, a.engine, largest, options, _device(a))
    if chosen.reason:
        print(f"llada2-mlx: {chosen.reason}", file=sys.stderr)
    return open_decoder(checkpoint, part, chosen.engine, _device(a), on_step)


def _decode_each(
    a: argparse.Namespace,
    checkpoint: Checkpoint,
    grids: Sequence[VQGrid],
    options: DecodeOptions,
    paths: Sequence[str],
) -> None:
    """Decode grids of any sizes one after the other. The seeds are those of a batch."""
    from .imaging import load_part
    from .imaging.pixels import to_images

    with _Bars() as on_step:

        def of(number: int) -> OnStep:
            return lambda progress: on_step(replace(progress, phase=f"picture {number}: {progress.phase}"))

        decoder = _decoder(a, checkpoint, grids, options, on_step)
        seeded = [replace(options, seed=picture_seed(options.seed, index)) for index in range(len(grids))]
        latents = [
            decoder.sample([grid], own, of(number))
            for number, (grid, own) in enumerate(zip(grids, seeded, strict=True), 1)
        ]
        del decoder  # makes room for the VAE
        vae = load_part(checkpoint, Part.VAE, _device(a), on_step)
        for number, (latent, own, path) in enumerate(zip(latents, seeded, paths, strict=True), 1):
            (image,) = to_images(vae.decode(latent, of(number)))
            _save_picture(a, image, path, own, picture=number)


def _save_picture(a: argparse.Namespace, image: Image.Image, path: str, options: DecodeOptions, **more: object) -> None:
    """Write a PNG file that carries its parameters."""
    from PIL.PngImagePlugin import PngInfo

    parameters = _parameters(a)
    way = {"decoder_steps": options.steps} | {name: getattr(options, name) for name in WAY}
    way["sampler"] = next(word for word, name in SAMPLERS.items() if name == options.sampler.value)
    parameters |= way | {"version": __version__, **more}
    metadata = PngInfo()
    metadata.add_itxt("parameters", json.dumps(parameters, default=str, ensure_ascii=False))
    with replacing(Path(path)) as partial:
        image.save(partial, format="PNG", pnginfo=metadata)
    print(f"{path}: {image.width} x {image.height} pixels")


def _save_confidence(a: argparse.Namespace, drawing: tasks.Drawing) -> None:
    """Write how sure the model was of each code of each picture, as large as the picture is decoded."""
    from .imaging.decoder import CODE_PIXELS
    from .imaging.pixels import to_images, to_mask

    if not a.confidence:
        return
    for certain, path in zip(drawing.confidence, _numbered(a.confidence, len(drawing.confidence)), strict=True):
        (image,) = to_images(to_mask([certain], CODE_PIXELS * a.upscale)[..., None])
        with replacing(Path(path)) as partial:
            image.save(partial, format="PNG")


def _parameters(a: argparse.Namespace) -> dict[str, object]:
    """What a command was told, for a picture that may be shown to others: of files and folders the names alone."""

    def shown(value: object) -> object:
        if isinstance(value, list):
            return [shown(each) for each in value]
        return Path(value).name if isinstance(value, FilePath) else value

    given = {key: shown(value) for key, value in vars(a).items() if key != "command" and value is not None}
    return given | {"model": _name(a.model)}


def _numbered(path: str, count: int) -> list[str]:
    """``path``, or a path for each of several: ``fox.png`` is ``fox-1.png``, ``fox-2.png`` and so on."""
    name = Path(path)
    return [path] if count == 1 else [str(name.with_stem(f"{name.stem}-{i}")) for i in range(1, count + 1)]


def _name(given: str) -> str:
    """A model's folder without where it is; a hub id stays whole."""
    return given if is_id(given) and not Path(given).exists() else Path(given).name


def _open(path: str) -> Image.Image:
    from PIL import Image, ImageOps

    try:
        image = ImageOps.exif_transpose(Image.open(path))  # a phone's upright picture lies on its side
        image.load()
    except FileNotFoundError:
        raise RequestError(f"There is no picture {path}.") from None
    except Exception as error:  # of a damaged file, Pillow raises whatever its readers raise
        raise RequestError(f"{path} cannot be read as a picture ({error}).") from None
    return image


def _check_outputs(a: argparse.Namespace, count: int = 1) -> None:
    """Say before the work that the pictures, or how sure the model was of them, cannot be written."""
    for path in (*_numbered(a.output, count), *(_numbered(a.confidence, count) if a.confidence else ())):
        _writable(path, ".png")
    if a.confidence and os.path.abspath(a.confidence) == os.path.abspath(a.output):
        raise RequestError(
            f"The picture and its confidence would both be written to {a.output}. Choose another name for one of them."
        )


def _writable(path: str, suffix: str) -> None:
    """Say before the work, not after it, that a file cannot be written."""
    target = Path(path)
    if target.suffix.lower() != suffix:
        raise RequestError(f"The output {path} has to end in {suffix}.")
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise RequestError(f"The output {path} cannot be written: its folder has to exist.")
    try:
        with tempfile.NamedTemporaryFile(dir=target.absolute().parent):
            pass
    except OSError as error:
        raise RequestError(f"The output {path} cannot be written ({error.strerror}).") from None


def _empty_folder(path: str) -> Path:
    """Say before the work, not after it, that a folder cannot be made, or holds something already."""
    folder = _folder(path)
    if folder.is_dir() and not holds_nothing(folder):
        raise RequestError(f"The folder {path} is not empty. Choose a new one, or empty it; nothing in it is replaced.")
    parent = folder if folder.is_dir() else folder.absolute().parent
    if not parent.is_dir():
        raise RequestError(f"The output {path} cannot be written: the folder that it is in has to exist.")
    try:
        with tempfile.NamedTemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise RequestError(f"The output {path} cannot be written ({error.strerror}).") from None
    return folder


def _folder(path: str) -> Path:
    """A folder, which need not be there yet."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"The output {path} is a file, not a folder. Choose another name.")
    return folder


def _write(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _decoder_parts(a: argparse.Namespace) -> tuple[Part, Part]:
    return DECODERS[a.decoder][0], Part.VAE


def _decode_options(a: argparse.Namespace) -> DecodeOptions:
    """The decoder's options, after all that can be checked without the model."""
    from .imaging.flow import DecodeOptions, Sampler, with_preset

    _device(a)
    if a.preset != "custom":
        _check_preset(a)
    steps = DECODERS[a.decoder][1] if a.decoder_steps is None else a.decoder_steps
    way = {name: default if getattr(a, name) is None else getattr(a, name) for name, default in WAY.items()}
    way["sampler"] = Sampler(SAMPLERS[way["sampler"]])
    way["cache_threshold"] = a.cache_threshold
    return with_preset(DecodeOptions(steps, a.decoder_guidance, a.seed, a.upscale, **way), PRESETS[a.preset])


def _check_decoder(a: argparse.Namespace, checkpoint: Checkpoint, *grids: VQGrid) -> None:
    """Say what else can be said before the work, now that the model is here; ``grids`` are what is there already."""
    from .imaging.decoder import check_decode
    from .imaging.engine import check_engine

    check_decode(checkpoint, DECODERS[a.decoder][0], a.upscale, grids)
    check_engine(checkpoint, DECODERS[a.decoder][0], a.engine)
    for grid in grids:
        require_same(grid, checkpoint)


def _check_preset(a: argparse.Namespace) -> None:
    """A preset decides alone, and for the full decoder."""
    if a.decoder != "full":
        raise RequestError(f"--preset {a.preset} is of the full decoder. Add --decoder full, or leave the preset out.")
    if given := [name for name in ("decoder_steps", *WAY) if getattr(a, name) is not None]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise RequestError(f"--preset {a.preset} decides {flags} too. Leave out the one or the other.")


def _sampling(a: argparse.Namespace) -> Sampling:
    from .backbone.acceptance import Sampling

    return Sampling(**{field.name: getattr(a, field.name) for field in fields(Sampling)})


def _sprint(a: argparse.Namespace) -> Sprint | None:
    from .backbone.sprint import Remasking, Sprint

    if not a.sprint:
        return None
    return Sprint(
        a.keep_ratio, a.warm_up, a.alpha, a.text_keep_ratio, a.image_keep_ratio, Remasking(RANKS[a.remasking])
    )


def _device(a: argparse.Namespace):
    from .imaging.device import usable

    return usable(a.device) if a.device else None


def _tell(report: Report) -> None:
    print(
        f"{report.blocks} blocks, {report.steps} steps, {report.positions} positions, {report.seconds:.1f} s",
        file=sys.stderr,
    )
