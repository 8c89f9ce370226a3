"""What is fuzzed of the library: each target is an input of a person's, or a file that anybody may have made."""

from __future__ import annotations

import gc
import io
import json
import shutil
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image
from synthetic import tiny, write_strewn

from llada2_mlx import commands, grids, prompts
from llada2_mlx.backbone.handle import Backbone
from llada2_mlx.checkpoint.layout import BUILT_IN, INDEX, Checkpoint, Part
from llada2_mlx.checkpoint.sizes import ImageSizes
from llada2_mlx.errors import CheckpointError, LLaDA2Error
from llada2_mlx.grids import Flip, Layout
from llada2_mlx.imaging import load_part
from llada2_mlx.imaging.pixels import to_cells, to_images, to_mask
from llada2_mlx.imaging.prepare import PATCH, Purpose, prepare_for, to_rgb
from llada2_mlx.tokens import Tokens
from llada2_mlx.vq import GridSet, Origin, VQGrid, readings, with_source

from .damage import NUMBERS, TEXTS, bytes_of, json_of, safetensors_of, written
from .harness import Target

CODES = 256  # of the codebook of a grid that is made here

small = st.integers(-3, 12)


@st.composite
def a_grid(draw: st.DrawFn, most: int = 9) -> VQGrid:
    """A grid that is one."""
    height, width = draw(st.integers(1, most)), draw(st.integers(1, most))
    codes = draw(st.lists(st.integers(0, CODES - 1), min_size=height * width, max_size=height * width))
    origin = draw(
        st.sampled_from([Origin(), Origin("a", "1", "2", "editing"), Origin("b", "", "3"), Origin("c", "4", "2")])
    )
    return VQGrid.from_list(codes, height, width, draw(st.sampled_from([CODES, CODES, CODES, CODES + 1])), origin)


# --- prompts ------------------------------------------------------------------------------------------------------


@cache
def the_tokens() -> Tokens:
    return Tokens(Checkpoint(BUILT_IN))


def _prompts(given: tuple) -> None:
    """Whatever is written is text: it adds no control token, and no image code."""
    text, other, grid = given
    tokens = the_tokens()
    grid = VQGrid(np.resize(grid.codes, (8, 8)), tokens.codebook_size)
    prompts.require_text(text, "prompt")
    asked = lambda text: [
        *prompts.text_to_image(tokens, text, 8, 8).branches,
        *prompts.thinking(tokens, text, 8, 8).branches,
        *prompts.understand(tokens, grid, text).branches,
        *prompts.edit(tokens, grid, text).branches,
        *prompts.story(tokens, text).branches,
        *prompts.chat(tokens, [prompts.Turn(text, grid, other)], text, system=other).branches,
        *prompts.chat(tokens, [prompts.Turn(other)], text).branches,
    ]
    special = set(tokens._tokenizer.get_added_vocab().values())
    only = lambda ids: [token for token in ids if token in special or token >= tokens.image_offset]
    for found, plain in zip(asked(text), asked("word"), strict=True):
        # a conversation without its system text has another one, of our own
        assert only(found) == only(plain), "what was written became control tokens or codes"
        assert all(0 <= token < tokens.image_offset + tokens.codebook_size for token in found)
    tokens.doubt(text)


# --- pictures and masks -------------------------------------------------------------------------------------------


@cache
def pictures() -> tuple[bytes, ...]:
    """Small files of several kinds."""
    image, files = Image.new("RGBA", (40, 30), (200, 100, 50, 128)), []
    image.paste((0, 0, 255, 255), (5, 5, 20, 20))
    for kind, mode in (
        ("PNG", "RGBA"),
        ("PNG", "P"),
        ("JPEG", "RGB"),
        ("WEBP", "RGBA"),
        ("GIF", "P"),
        ("TIFF", "L"),
        ("BMP", "RGB"),
    ):
        file = io.BytesIO()
        image.convert(mode).save(file, kind)
        files.append(file.getvalue())
    file = io.BytesIO()
    Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40)).save(file, "PNG")
    return *files, file.getvalue()


def _picture_files(content: bytes) -> None:
    path = Path(tempfile.gettempdir()) / "fuzzed-picture"
    path.write_bytes(content)
    image = commands._open(str(path))
    _prepared(image, Purpose.UNDERSTAND, 0)


def _prepared(image: Image.Image, purpose: Purpose, side: int) -> None:
    for sizes in (ImageSizes(), ImageSizes(256, 256, 256, 2)):
        made = prepare_for(sizes, image, purpose, side)
        assert made.mode == "RGB" and made.width % PATCH == made.height % PATCH == 0
        assert 8 <= made.width // PATCH <= 255 and 8 <= made.height // PATCH <= 255


MODES = (
    "1",
    "L",
    "LA",
    "P",
    "RGB",
    "RGBA",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
    "PA",
    "RGBX",
    "La",
    "RGBa",
)


@st.composite
def an_image(draw: st.DrawFn) -> tuple[Image.Image, Purpose, int]:
    # thin and small, and seldom large: what matters are the shapes
    side = st.one_of(st.integers(0, 40), st.integers(0, 300), st.sampled_from([1, 1500]))
    size = draw(side), draw(side)
    image = Image.new(draw(st.sampled_from(MODES)), size)
    if image.mode == "F" and 0 not in size:
        values = np.full(size[::-1], draw(st.floats(width=32)), np.float32)
        image = Image.fromarray(values)
    return image, draw(st.sampled_from(list(Purpose))), draw(st.sampled_from([0, 0, 128, 512]) | st.integers(-5, 5000))


def _images(given: tuple) -> None:
    image, purpose, side = given
    rgb = to_rgb(image)
    assert rgb.mode == "RGB" and rgb.size == image.size
    _prepared(image, purpose, side)


@st.composite
def a_tensor(draw: st.DrawFn, dimensions: st.SearchStrategy) -> torch.Tensor:
    shape = [draw(st.integers(0, 6)) for _ in range(draw(dimensions))]
    if shape and draw(st.booleans()):
        shape[-1] = draw(st.sampled_from([1, 3, 4]))
    dtype = draw(
        st.sampled_from(
            [torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.bool, torch.float64]
        )
    )
    values = draw(st.lists(st.floats(width=16), min_size=1, max_size=5))
    count = int(np.prod(shape, dtype=int))
    return (
        torch.nan_to_num(torch.tensor(np.resize(values, count))).to(dtype).reshape(shape)
        if dtype
        in (
            torch.uint8,
            torch.bool,
        )
        else torch.tensor(np.resize(values, count)).to(dtype).reshape(shape)
    )


def _tensors(given: tuple) -> None:
    """ComfyUI's tensors of pictures and masks, as any node may make them."""
    pixels, mask = given
    images = to_images(pixels, mask)
    assert len(images) == len(pixels) and all(image.size == (pixels.shape[2], pixels.shape[1]) for image in images)


def _masks(given: tuple) -> None:
    mask, batch, threshold, by = given
    for grid, covered in zip(batch, to_cells(mask, batch, threshold), strict=True):
        if covered is None:
            continue
        assert covered.shape == grid.codes.shape and covered.dtype == bool
        more = grids.grown(covered, by)
        assert more.shape == covered.shape and (more >= covered).all()
        to_mask([more], 2)


# --- grids and sets -----------------------------------------------------------------------------------------------


@st.composite
def any_array(draw: st.DrawFn) -> tuple:
    dtype = draw(
        st.sampled_from([np.int32, np.int64, np.uint8, np.uint64, np.float32, np.bool_, np.complex64, object, str])
    )
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    value = draw(st.one_of(st.integers(-2, 300), NUMBERS))
    try:
        with np.errstate(all="ignore"):
            codes = np.full(shape, value, dtype)
    except (OverflowError, ValueError, TypeError):
        codes = [[value, 1], [2]]
    return codes, draw(st.sampled_from([CODES, CODES, 0, -1, 2**31, 2**63, 1.5, None, "256", True]))


def _arrays(given: tuple) -> None:
    codes, size = given
    grid = VQGrid(codes, size)
    assert grid.codes.dtype == np.int32 and not grid.codes.flags.writeable and grid.codes.max() < size
    assert np.array_equal(grid.codes, np.asarray(codes))


def _grids(given: tuple) -> None:
    """No code changes, whatever is done; only where it stands."""
    one, other, left, top, width, height, flip, layout, where = given
    assert grids.flip(grids.flip(one, flip), flip) == one
    for act in (_cut, _join, _difference):
        try:
            act(one, other, left, top, width, height, layout, where)
        except LLaDA2Error:
            continue
    _cut(one, other, left, top, width, height, layout, where)


def _cut(one, other, left, top, width, height, layout, where) -> None:
    piece = grids.crop(one, left, top, width, height)
    assert np.array_equal(piece.codes, one.codes[top : top + piece.height, left : left + piece.width])
    assert grids.paste(one, piece, left, top) == one
    pasted = grids.paste(one, other, left, top, where)
    assert pasted.codes.shape == one.codes.shape


def _join(one, other, left, top, width, height, layout, where) -> None:
    joined = grids.join([one, other], layout)
    assert joined.codes.size == one.codes.size + other.codes.size


def _difference(one, other, left, top, width, height, layout, where) -> None:
    assert grids.difference(one, other).any() == (one != other)


def _sets(given: tuple) -> None:
    batch, number, as_set = given
    vq = GridSet(tuple(batch)) if as_set else batch
    chosen = with_source(vq, number)
    assert sorted(map(id, chosen.grids if as_set else chosen)) == sorted(map(id, batch))
    assert len(readings(chosen)) == (1 if as_set else len(batch))
    for grid in batch:
        prompts.require_codebook(the_tokens(), grid)


# --- files --------------------------------------------------------------------------------------------------------


@cache
def a_saved_grid() -> bytes:
    path = Path(tempfile.mkdtemp()) / "codes.safetensors"
    VQGrid(np.arange(80).reshape(8, 10), CODES, Origin("m", "1", "2", "editing")).save(path, {"prompt": '{"1": {}}'})
    return path.read_bytes()


def _saved_grids(content: bytes) -> None:
    path = Path(tempfile.gettempdir()) / "fuzzed-codes.safetensors"
    path.write_bytes(content)
    grid = VQGrid.load(path)
    grid.save(path)
    assert VQGrid.load(path) == grid


PARTS = {
    "config.json": Part.BACKBONE,
    "tokenizer.json": Part.BACKBONE,
    "tokenizer_config.json": Part.BACKBONE,
    "model.safetensors": Part.BACKBONE,
    "image_tokenizer/config.json": Part.IMAGE_TOKENIZER,
    "image_tokenizer/image_tokenizer.safetensors": Part.IMAGE_TOKENIZER,
    "image_tokenizer/sigvq_embedding.pt": Part.PRIOR,
    "decoder-turbo/config.json": Part.DECODER_TURBO,
    "decoder-turbo/decoder_model.safetensors": Part.DECODER_TURBO,
    "vae/config.json": Part.VAE,
    "vae/diffusion_pytorch_model.safetensors": Part.VAE,
    INDEX: Part.BACKBONE,
}


@cache
def whole() -> dict[str, Path]:
    """Model folders by the names of the files that they have."""
    folder = Path(tempfile.mkdtemp())
    one, strewn = Path(shutil.copytree(tiny(), folder / "one")), write_strewn(folder / "strewn")
    return {name: strewn if name == INDEX else one for name in PARTS}


@st.composite
def a_file_of_a_model(draw: st.DrawFn, suffixes: tuple[str, ...]) -> tuple[str, bytes]:
    name = draw(st.sampled_from([name for name in PARTS if name.endswith(suffixes)]))
    content = (whole()[name] / name).read_bytes()
    if name.endswith(".safetensors"):
        return name, draw(safetensors_of(content))
    if name.endswith(".json") and draw(st.integers(0, 4)):
        # of a list of words only its beginning: else hardly anything but words would be changed
        return name, written(draw(json_of(json.loads(content))))
    return name, draw(bytes_of(content))


def _model_files(given: tuple[str, bytes]) -> None:
    """A model with one file that is damaged: everything that is said of it, and its part opened."""
    name, content = given
    path = whole()[name] / name
    kept = path.read_bytes()
    try:
        # another file in its place, as a person would put it there: what has read the old one keeps it
        path.unlink()
        path.write_bytes(content)
        checkpoint, part = Checkpoint(path.parents[name.count("/")]), PARTS[name]
        for each in Part:
            checkpoint.state(each)
            checkpoint.fingerprint(each)
        with suppress(CheckpointError):
            assert checkpoint.image_sizes is not None and isinstance(checkpoint.world, str)
        if part is Part.BACKBONE:
            backbone = Backbone(checkpoint, "float32")
            assert backbone.tokens.sizes is not None
            backbone.load()
            backbone.unload()
        elif part is Part.DECODER_TURBO:
            for engine in ("torch", "mlx"):
                load_part(checkpoint, part, torch.device("cpu"), engine=engine)
        else:
            load_part(checkpoint, part, torch.device("cpu"))
    finally:
        path.unlink()
        path.write_bytes(kept)
        gc.collect()


CONFIGS, WEIGHTS = (".json",), (".safetensors", ".pt")

TARGETS = [
    Target("prompts", st.tuples(TEXTS, TEXTS, a_grid()), _prompts, 4),
    Target(
        "files of pictures",
        st.sampled_from(range(8)).flatmap(lambda kind: bytes_of(pictures()[kind])),
        _picture_files,
        2,
    ),
    Target("pictures of any mode and shape", an_image(), _images, 4),
    Target("tensors of pictures", st.tuples(a_tensor(st.integers(0, 5)), st.none() | a_tensor(st.just(3))), _tensors),
    Target(
        "masks",
        st.tuples(
            a_tensor(st.integers(1, 4)),
            st.lists(a_grid(), min_size=1, max_size=3),
            st.floats(0.01, 1) | st.floats(),
            st.integers(0, 5) | st.integers(),
        ),
        _masks,
    ),
    Target("arrays of codes", any_array(), _arrays),
    Target(
        "what is done with grids",
        st.tuples(
            a_grid(),
            a_grid(),
            small,
            small,
            small,
            small,
            st.sampled_from(list(Flip)),
            st.sampled_from(list(Layout)),
            st.none() | st.tuples(st.integers(0, 4), st.integers(0, 4)).map(lambda shape: np.ones(shape, bool)),
        ),
        _grids,
    ),
    Target("sets", st.tuples(st.lists(a_grid(), max_size=4), small, st.booleans()), _sets),
    Target("saved grids", st.deferred(lambda: safetensors_of(a_saved_grid())), _saved_grids),
    Target("configs, indexes and text tokenizers", a_file_of_a_model(CONFIGS), _model_files, 20),
    Target("headers and files of weights", a_file_of_a_model(WEIGHTS), _model_files, 20),
]
