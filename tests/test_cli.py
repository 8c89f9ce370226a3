"""The command line, as a person uses it."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import signal
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from demonstration import Demo
from pictures import noise
from PIL import Image
from scripted import ScriptedNetwork
from storyteller import TEXTS, codes, write_storyteller
from synthetic import tiny

from llada2_mlx import cli, commands, imaging, prompts, tasks
from llada2_mlx.backbone.handle import Backbone
from llada2_mlx.backbone.session import Report
from llada2_mlx.checkpoint.codebook import origin
from llada2_mlx.checkpoint.layout import BUILT_IN, Checkpoint, Part
from llada2_mlx.imaging import engine
from llada2_mlx.imaging.flow import CUSTOM, PRESETS, DecodeOptions
from llada2_mlx.imaging.look import look, palette
from llada2_mlx.shapes import gallery
from llada2_mlx.vq import VQGrid


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a command in an empty folder, with a tiny model as the default: exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    for module in (cli, commands):
        monkeypatch.setattr(module, "BUILT_IN", tiny())

    def command(*words: str) -> tuple[int, str, str]:
        status = cli.main(list(words))
        return status, *capsys.readouterr()

    return command


def test_a_picture_from_a_text_and_its_parameters(run, tmp_path: Path) -> None:
    status, out, err = run(
        "t2i", "a red circle, 赤い円", "--seed", "3", "--steps", "4", "-o", "red.png", "--codes", "red.safetensors"
    )
    assert (status, out) == (0, "red.png: 256 x 256 pixels\n")
    assert "positions" in err
    with Image.open("red.png") as image:
        assert image.size == (256, 256)
        parameters = json.loads(image.text["parameters"])
    assert parameters["prompt"] == "a red circle, 赤い円"
    assert (parameters["model"], parameters["output"], parameters["codes"]) == (
        tiny().name,  # names, not where they are on this machine
        "red.png",
        "red.safetensors",
    )
    assert (parameters["seed"], parameters["steps"], parameters["decoder_steps"], parameters["decoder"]) == (
        3,
        4,
        8,
        "turbo",
    )
    assert not list(Path().glob(".*"))  # nothing half-written is left

    # the codes that were kept give the same picture
    assert run("decode", "red.safetensors", "--seed", "3", "-o", "again.png")[0] == 0
    with Image.open("red.png") as first, Image.open("again.png") as second:
        assert first.tobytes() == second.tobytes()


def test_pictures_are_numbered(run) -> None:
    wild = ("--temperature", "2", "--steps", "2", "--seed", "4")
    status, out, _ = run("t2i", "a cat", *wild, "--pictures", "2", "-o", "cat.png", "--codes", "cat.safetensors")
    assert (status, out) == (0, "cat-1.png: 256 x 256 pixels\ncat-2.png: 256 x 256 pixels\n")
    assert run("t2i", "a cat", *wild[:-1], "5", "-o", "alone.png", "--codes", "alone.safetensors")[0] == 0
    assert VQGrid.load("alone.safetensors") == VQGrid.load("cat-2.safetensors") != VQGrid.load("cat-1.safetensors")
    with Image.open("alone.png") as alone, Image.open("cat-2.png") as second:
        assert alone.tobytes() == second.tobytes()
    status, _, err = run("t2i", "a cat", "--pictures", "65")
    assert status == 1 and "from 1 to 64" in err


def test_sprint(run) -> None:
    status, *_ = run("t2i", "a cat", "--sprint", "--keep-ratio", "0.3", "--remasking", "margin", "-o", "fast.png")
    assert status == 0
    status, out, _ = run("understand", "fast.png", "What is it?", "--sprint", "--max-new-tokens", "16", "--steps", "4")
    assert status == 0 and out
    status, _, err = run("edit", "fast.png", "Make it blue.", "--sprint", "--steps", "1", "-o", "blue.png")
    assert status == 0 and "warning: SPRINT is not used in editing" in err
    status, _, err = run("t2i", "a cat", "--sprint", "--warm-up", "0")
    assert status == 1 and "SPRINT's warm up is 0; it has to be from 1" in err


def test_a_part_is_redrawn_and_a_picture_grows(run, tmp_path: Path) -> None:
    assert run("t2i", "a cat", "-o", "cat.png", "--codes", "cat.safetensors")[0] == 0
    mask = Image.new("L", (50, 50))
    mask.paste(255, (25, 0, 50, 25))
    mask.save("mask.png")
    for seeing in ("picture", "before"):
        paths = [str(tmp_path / name) for name in ("cat.safetensors", "mask.png", "dog.png")]
        status, out, err = run("redraw", *paths[:2], "a dog", "--seeing", seeing, "-o", paths[2])
        assert status == 0 and out.endswith("dog.png: 256 x 256 pixels\n"), err
        with Image.open("dog.png") as image:
            parameters = json.loads(image.text["parameters"])
        assert [parameters[key] for key in ("image", "mask", "output")] == ["cat.safetensors", "mask.png", "dog.png"]
        assert str(tmp_path) not in image.text["parameters"]
    assert run("redraw", "cat.png", "mask.png", "a dog", "--size", "128", "--mask-grow", "1", "-o", "dog.png")[0] == 0
    status, out, _ = run("grow", "cat.safetensors", "a cat and a dog", "--right", "2", "-o", "wide.png")
    assert (status, out) == (0, "wide.png: 320 x 256 pixels\n")
    Image.new("L", (50, 50)).save("empty.png")
    for words, sentence in (
        (("redraw", "cat.safetensors", "empty.png", "a dog"), "covers no code"),
        (("redraw", "cat.safetensors", "gone.png", "a dog"), "no picture gone.png"),
        (("redraw", "gone.safetensors", "mask.png", "a dog"), "no file gone.safetensors"),
        (("redraw", "cat.safetensors", "mask.png", " "), "text is empty"),
        (("grow", "cat.safetensors", "a dog"), "Nothing is to be added"),
        (("grow", "cat.safetensors", "a dog", "--top", "1"), "no size tokens"),
    ):
        status, _, err = run(*words)
        assert status == 1 and sentence in err


def test_what_the_model_was_least_sure_of_is_redrawn(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what the one command wrote and the other reads, and with no more than that."""
    drawings = []
    for name in ("text_to_vq", "redraw", "grow"):
        task = getattr(tasks, name)
        monkeypatch.setattr(tasks, name, lambda *a, _task=task, **b: (drawings.append(_task(*a, **b)), drawings[-1])[1])

    def shown(path: str, certain: np.ndarray, pixels: int = 32) -> np.ndarray:
        with Image.open(path) as image:
            assert image.mode == "L" and image.size == tuple(pixels * side for side in certain.shape[::-1])
            grey = np.asarray(image)
        assert (grey == grey[::pixels, ::pixels].repeat(pixels, 0).repeat(pixels, 1)).all()
        assert np.abs(grey[::pixels, ::pixels] / 255 - certain).max() < 0.5 / 255 + 1e-6
        return grey[::pixels, ::pixels]

    quick = ("--steps", "4", "--decoder-steps", "2")
    assert run("t2i", "a cat", *quick, "--codes", "cat.safetensors", "--confidence", "sure.png")[0] == 0
    (certain,) = drawings[-1].confidence
    grey = shown("sure.png", certain)
    assert len(np.unique(grey)) > 4
    threshold = 1 - (np.median(grey) + 0.5) / 255
    words = ("redraw", "cat.safetensors", "sure.png", "a cat", *quick, "--invert-mask", "--upscale", "1")
    assert run(*words, "--mask-threshold", f"{threshold:.6f}", "--confidence", "again.png")[0] == 0
    masked = drawings[-1].masked
    assert (masked == (grey <= np.median(grey))).all() and 0 < masked.sum() < masked.size
    assert certain[masked].max() <= certain[~masked].min()
    assert (drawings[-1].grid.codes[~masked] == VQGrid.load("cat.safetensors").codes[~masked]).all()
    assert (shown("again.png", drawings[-1].confidence[0], 16)[~masked] == 255).all()

    assert run("grow", "cat.safetensors", "a cat", *quick, "--right", "2", "--confidence", "grown.png")[0] == 0
    assert (shown("grown.png", drawings[-1].confidence[0])[:, :8] == 255).all()
    wild = ("--temperature", "2", "--pictures", "2")
    assert run("t2i", "a cat", *quick, *wild, "--confidence", "sure.png")[0] == 0
    for number, each in enumerate(drawings[-1].confidence, 1):
        shown(f"sure-{number}.png", each)


# arguments that take any text and are no path; what is in neither list is a path without its type
TEXTS_OF_ARGUMENTS = {"prompt", "question", "instruction", "text", "system", "device", "solver"}


def test_a_picture_says_nothing_of_where_files_are() -> None:
    """Of every argument of every command, also of those that are still to come."""
    (commands_of,) = (action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction))
    for command, parser in commands_of.choices.items():
        told = argparse.Namespace(command=None)
        for action in parser._actions:
            taken = action.nargs != 0 and not action.choices and action.type in (None, commands.FilePath)
            if taken and action.dest not in TEXTS_OF_ARGUMENTS:
                value = (action.type or str)(f"secret/{action.dest}.png")  # has the form of a hub id too
                setattr(told, action.dest, [value] if isinstance(action, argparse._AppendAction) else value)
        told.model = "/home/secret/models/own"
        assert "secret" not in json.dumps(commands._parameters(told)), command


def test_a_plan_that_begins_no_picture(run) -> None:
    status, _, err = run("t2i", "a cat", "--thinking", "--thinking-length", "20", "--thinking-steps", "2")
    assert status == 1 and ("begins" in err or "began no picture" in err or "without beginning" in err)
    assert not list(Path().glob("*.png"))


def test_plans_that_choose_several_sizes(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures are decoded one by one, each with the seed that it has in a batch."""
    drawn = [VQGrid(np.arange(rows * 8).reshape(rows, 8), 256, origin(Checkpoint(tiny()))) for rows in (8, 10)]
    sure = tuple(np.ones(grid.codes.shape, np.float32) for grid in drawn)
    monkeypatch.setattr(tasks, "text_to_vq", lambda *_, **__: tasks.Drawing(tuple(drawn), Report(), sure))
    words = ("--thinking", "--thinking-temperature", "1", "--pictures", "2", "--seed", "4", "--decoder-steps", "2")
    status, out, err = run("t2i", "a cat", *words, "-o", "cat.png", "--codes", "cat.safetensors")
    assert (status, out) == (0, "cat-1.png: 256 x 256 pixels\ncat-2.png: 256 x 320 pixels\n"), err
    assert "made for drawing at 256 x 256 pixels, and this is 256 x 320" in err
    for number, seed in ((1, "4"), (2, "5")):
        assert run("decode", f"cat-{number}.safetensors", "--seed", seed, "--decoder-steps", "2")[0] == 0
        with Image.open(f"cat-{number}.png") as together, Image.open("picture.png") as alone:
            assert together.tobytes() == alone.tobytes()
            assert json.loads(together.text["parameters"])["picture"] == number


ASKED = "a fox & its <den>"


def story_of(monkeypatch: pytest.MonkeyPatch, stops_at: int | None = None) -> list[str]:
    """Let the tiny model tell two pictures with a text before each; returns its texts.

    Args:
        stops_at: how many positions after the request Ctrl-C is pressed.
    """
    backbone = Backbone(Checkpoint(tiny()), "float32")
    tokens, texts = backbone.tokens, ["A fox <b>woke</b> up.\n\nEarly & cold.", "It slept."]
    codes = lambda size, code: tokens.codes_to_ids([code] * size)
    script = [*tokens.encode(texts[0]), *tokens.header(8, 8), *codes(64, 3), tokens.image_end]
    script += [*tokens.encode(texts[1]), *tokens.header(8, 10), *codes(80, 5), tokens.image_end, tokens.end]
    request = prompts.story(tokens, ASKED).conditional

    class Network(ScriptedNetwork):
        def __call__(self, ids, start=0, *rest):
            if stops_at is not None and start >= len(request) + stops_at:
                raise KeyboardInterrupt
            return super().__call__(ids, start, *rest)

    network = Network(backbone, [*request, *script])
    monkeypatch.setattr(Backbone, "load", lambda self, on_step=None: network)
    return texts


STORY = ("story", ASKED, "--rescale", "0", "--steps", "4", "--decoder-steps", "2")


def test_a_story_is_a_page_with_its_pictures(run, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = story_of(monkeypatch)
    status, out, _ = run(*STORY, "--seed", "6", "-o", "tale")
    assert status == 0 and out.splitlines() == [
        "tale/picture_1.png: 256 x 256 pixels",
        "tale/picture_2.png: 320 x 256 pixels",
        "tale/index.html: 2 texts, 2 pictures",
    ]
    pictures = [f"picture_{number}.{suffix}" for number in (1, 2) for suffix in ("png", "safetensors")]
    assert sorted(path.name for path in Path("tale").iterdir()) == ["index.html", *pictures, "story.md"]
    page = Path("tale/index.html").read_text()
    assert re.findall(r'src="([^"]+)"', page) == ["picture_1.png", "picture_2.png"]
    assert "<p>A fox &lt;b&gt;woke&lt;/b&gt; up.</p>" in page and "<p>Early &amp; cold.</p>" in page
    assert "<h1>a fox &amp; its &lt;den&gt;</h1>" in page and "<b>" not in page
    links = [f"![picture {number}](picture_{number}.png)" for number in (1, 2)]
    assert Path("tale/story.md").read_text() == f"{texts[0]}\n\n{links[0]}\n\n{texts[1]}\n\n{links[1]}\n"
    grid = VQGrid.load("tale/picture_2.safetensors")
    assert grid.codes.tolist() == [[5] * 10] * 8 and grid.origin == origin(Checkpoint(tiny()))
    # each picture is its codes decoded with a seed of its own
    words = ("--seed", "7", "--decoder-steps", "2", "-o", "again.png")
    assert run("decode", "tale/picture_2.safetensors", *words)[0] == 0
    with Image.open("tale/picture_2.png") as told, Image.open("again.png") as again:
        assert told.tobytes() == again.tobytes()
        assert json.loads(told.text["parameters"])["picture"] == 2


def test_the_language_model_is_let_go_before_a_storys_pictures_are_decoded(
    run, monkeypatch: pytest.MonkeyPatch
) -> None:
    story_of(monkeypatch)
    order, unload, load, decoder = [], Backbone.unload, imaging.load_part, engine.open_decoder
    monkeypatch.setattr(Backbone, "unload", lambda self: (order.append("let go"), unload(self)))
    monkeypatch.setattr(imaging, "load_part", lambda *what: (order.append(what[1]), load(*what))[1])
    monkeypatch.setattr(engine, "open_decoder", lambda *what: (order.append(what[1]), decoder(*what))[1])
    assert run(*STORY)[0] == 0
    assert order == ["let go", Part.DECODER_TURBO, Part.VAE]


def test_a_story_that_is_stopped_keeps_what_is_finished(run, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = story_of(monkeypatch, stops_at=150)
    status, _, err = run(*STORY)
    assert status == 130 and err.endswith("stopped\n")
    assert sorted(path.name for path in Path("story").iterdir()) == ["picture_1.safetensors", "story.md"]
    assert VQGrid.load("story/picture_1.safetensors").codes.tolist() == [[3] * 8] * 8
    assert Path("story/story.md").read_text() == f"{texts[0]}\n\n![picture 1](picture_1.png)\n"


def test_a_story_that_is_killed_leaves_nothing_half_written(tmp_path: Path) -> None:
    """With a real network, in a process of its own."""
    model, folder = write_storyteller(tmp_path / "storyteller"), tmp_path / "story"
    one_by_one = ["--block-length", "1", "--steps", "1", "--text-steps", "1", "--precision", "float32"]
    words = ["story", "Tell it.", *one_by_one, "--model", str(model), "--decoder-steps", "200", "-o", str(folder)]
    process = subprocess.Popen([sys.executable, "-m", "llada2_mlx.cli", *words], stderr=subprocess.DEVNULL)
    while not (folder / "picture_1.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert "index.html" not in names and VQGrid.load(folder / "picture_1.safetensors").to_list() == codes(0)
    if "picture_2.safetensors" in names:
        assert VQGrid.load(folder / "picture_2.safetensors").to_list() == codes(1)
    if "story.md" in names:
        assert (folder / "story.md").read_text().startswith(f"{TEXTS[0]}\n\n![picture 1](picture_1.png)\n")


def test_a_story_replaces_nothing(run) -> None:
    Path("story").mkdir()
    Path("story/mine.txt").write_text("mine")
    Path("file").write_text("mine")
    for folder, message in (("story", "is not empty"), ("file", "is a file"), ("no/such", "has to exist")):
        status, _, err = run("story", "a fox", "-o", folder)
        assert status == 1 and message in err and err.count("\n") == 1
    assert [path.name for path in Path("story").iterdir()] == ["mine.txt"]


def test_a_folder_in_which_a_story_was_killed_at_its_first_file_is_empty(run, monkeypatch: pytest.MonkeyPatch) -> None:
    story_of(monkeypatch)
    Path("story").mkdir()
    Path("story/.123-abc.partial").write_text("half a picture")
    assert run(*STORY)[0] == 0
    assert Path("story/index.html").exists()


def test_a_model_that_tells_nothing_leaves_nothing(run) -> None:
    """A model of random weights."""
    status, _, err = run("story", "a red circle", "--text-length", "64")
    assert (status == 0) == Path("story/index.html").exists()
    assert status == 0 or "neither text nor a picture" in err and not Path("story").exists()


def test_a_question(run) -> None:
    noise(128, 128).save("picture.png")
    status, out, _ = run("understand", "picture.png", "What is it?", "--max-new-tokens", "16", "--steps", "4")
    assert status == 0 and out


def test_an_edit(run) -> None:
    noise(300, 260).save("picture.jpg")
    status, out, _ = run(
        "edit",
        "picture.jpg",
        "Make it blue.",
        "--steps",
        "1",
        "--decoder-steps",
        "2",
        "--upscale",
        "1",
        "-o",
        "edited.png",
    )
    assert (status, out) == (0, "edited.png: 544 x 480 pixels\n")


def test_to_codes_and_back(run) -> None:
    noise(128, 160).save("picture.png")
    assert (
        run("encode", "picture.png", "-o", "codes.safetensors")[1] == "codes.safetensors: VQGrid(10 x 8 codes of 256)\n"
    )
    assert VQGrid.load("codes.safetensors").codes.shape == (10, 8)
    for words in (
        ("--decoder", "full", "--decoder-steps", "3"),
        ("--sampler", "published", "--decoder-guidance", "0"),
        ("--solver", "ab2", "--time-shift", "1", "--guidance-start", "0.2", "--guidance-end", "0.8"),
        ("--solver", "midpoint", "--cache-threshold", "0.2"),
    ):
        assert run("decode", "codes.safetensors", *words, "-o", "back.png")[1] == "back.png: 256 x 320 pixels\n"


def test_the_decoder_runs_in_either_engine_and_with_8_bits(run) -> None:
    grid = VQGrid(np.random.default_rng(0).integers(0, 256, (8, 10)), 256)
    grid.save("codes.safetensors")

    def decoded(*words: str) -> tuple[np.ndarray, str]:
        status, _, err = run("decode", "codes.safetensors", "--decoder-steps", "3", "--upscale", "1", *words)
        assert status == 0, err
        with Image.open("picture.png") as image:
            assert json.loads(image.text["parameters"])["engine"] in (*words, "auto")
            return np.asarray(image).astype(int), err

    expected, said = decoded("--engine", "mlx")
    assert not said
    # the tiny model is stored in bf16, and PyTorch runs it so; MLX on a CPU in float32
    assert np.abs(decoded("--engine", "torch")[0] - expected).mean() < 2
    assert run("convert", str(tiny()), "small", "--decoder-bits", "8")[0] == 0
    for name in ("decoder", "decoder-turbo"):
        assert json.loads(Path("small", name, "config.json").read_text())["quantization"]["bits"] == 8
        small, whole = (Path(root, name, "decoder_model.safetensors") for root in ("small", tiny()))
        assert not small.samefile(whole) and Path("small/vae/config.json").exists()
    found, said = decoded("--model", "small")
    assert "Decoder: MLX, because this one has 8 bits" in said and 0 < np.abs(found - expected).mean() < 2
    status, _, err = run("decode", "codes.safetensors", "--model", "small", "--engine", "torch")
    assert status == 1 and "has 8 bits, which only MLX runs. Choose the engine auto or mlx" in err


def test_a_preset_is_its_options_and_travels_with_the_picture(run) -> None:
    VQGrid(np.arange(80).reshape(8, 10), 256).save("codes.safetensors")
    words, pictures, fast = ("decode", "codes.safetensors", "--decoder", "full", "--upscale", "1"), {}, PRESETS["fast"]
    steps = ("--decoder-steps", str(fast.steps))
    for name, way in (
        ("preset", ("--preset", "fast")),
        ("same", (*steps, "--solver", fast.solver, "--time-shift", str(fast.time_shift))),
        ("other", steps),
    ):
        assert run(*words, *way, "-o", f"{name}.png")[0] == 0
        with Image.open(f"{name}.png") as image:
            pictures[name], told = image.tobytes(), json.loads(image.text["parameters"])
        assert (told["decoder_steps"], told["sampler"]) == (fast.steps, "ode")
        assert told["solver"] == ("euler" if name == "other" else fast.solver)
    assert pictures["preset"] == pictures["same"] != pictures["other"]


def test_the_help_says_what_a_preset_calls(run, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        run("decode", "--help")
    said = " ".join(capsys.readouterr().out.split())
    for word, name in commands.PRESETS.items():
        assert name == CUSTOM or f"{word} {PRESETS[name].network_calls}" in said
    assert [*commands.PRESETS.values()] == [CUSTOM, *PRESETS]
    usual = {name: getattr(DecodeOptions(), name) for name in commands.WAY}
    assert commands.WAY | {"sampler": commands.SAMPLERS[commands.WAY["sampler"]]} == usual | {
        "sampler": usual["sampler"].value
    }


def test_a_look_at_codes(run) -> None:
    grid = VQGrid(np.arange(80).reshape(8, 10), 256)
    grid.save("codes.safetensors")
    assert run("look", "codes.safetensors", "--pixels", "4")[:2] == (0, "look.png: 40 x 32 pixels\n")
    with Image.open("look.png") as image:
        assert (np.asarray(image) == look(grid.codes, palette(Checkpoint(tiny())), scale=4)).all()
    status, _, err = run("look", "codes.safetensors", "--model", str(BUILT_IN), "--pixels", "0")
    assert status == 1 and "shown by 1 to 64 pixels" in err
    VQGrid(grid.codes, 256, origin(Checkpoint(tiny()))).save("codes.safetensors")
    status, _, err = run("look", "codes.safetensors", "--model", str(BUILT_IN))
    assert status == 1 and "shapes has another codebook" in err
    VQGrid(grid.codes % 5, 5).save("codes.safetensors")  # without fingerprints, and each code has a colour
    status, _, err = run("look", "codes.safetensors")
    assert status == 1 and "made by a model with 5 codes; the image tokenizer" in err


def test_what_a_model_is(run) -> None:
    status, out, _ = run("info")
    assert status == 0 and "turbo decoder: complete" in out and '"num_experts": 16' in out and "256 x 256 pixels" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("t2i", " "), "prompt is empty"),
        (("understand", "picture.png", ""), "question is empty"),
        (("edit", "picture.png", ""), "instruction is empty"),
        (("story", " "), "prompt is empty"),
        (("story", "a cat", "--pictures", "0"), "story of 0 pictures"),
        (("story", "a cat", "--picture-codes", "9"), "smallest one has 64"),
        (("story", "a cat", "--decoder-steps", "0"), "steps"),
        (("t2i", "a cat", "--guidance-start", "0.6", "--guidance-end", "0.2"), "start before the end"),
        (("t2i", "a cat", "--time-shift", "0.5"), "time shift"),
        (("t2i", "a cat", "--cache-threshold", "2"), "cache threshold"),
        (("t2i", "a cat", "--preset", "fast"), "--preset fast is of the full decoder. Add --decoder full"),
        (
            ("t2i", "a cat", "--decoder", "full", "--preset", "fast", "--solver", "ab2", "--decoder-steps", "9"),
            "decides --decoder-steps, --solver too",
        ),
        (("t2i", "a cat", "--width", "100"), "multiples of 32"),
        (("t2i", "a cat", "--steps", "0"), "steps is 0"),
        (("t2i", "a cat", "--guidance", "-1"), "guidance scale is -1"),
        (("t2i", "a cat", "--solver", "best"), "There is no solver 'best'"),
        (("t2i", "a cat", "-o", "nowhere/picture.png"), "its folder has to exist"),
        (("t2i", "a cat", "-o", "picture.jpg"), "has to end in .png"),
        (("t2i", "a cat", "--device", "abacus"), "The device 'abacus' cannot be used"),
        (("t2i", "a cat", "--device", "meta"), "cannot be used"),
        (("t2i", "a\udcff"), "The text cannot be read"),
        (("t2i", "a cat", "-o", "/proc/picture.png"), "cannot be written"),
        (("t2i", "a cat", "--model", "no/such/folder"), "There is no model folder"),
        (("encode", "missing.png"), "There is no picture missing.png"),
        (("encode", "text.png"), "cannot be read as a picture"),
        (("decode", "missing.safetensors"), "There is no file"),
        (("look", "missing.safetensors"), "There is no file"),
        (("look", "text.png"), "is not a grid of codes"),
    ],
)
def test_what_cannot_be_done_is_one_line(run, words: tuple[str, ...], message: str) -> None:
    Path("text.png").write_text("no picture")
    status, _, err = run(*words)
    assert status == 1 and err.startswith("llada2-mlx: ") and message in err and err.count("\n") == 1
    assert sorted(path.name for path in Path().iterdir()) == ["text.png"]


EDIT = ("edit", "cat.png", "Make it blue.")
REDRAW = ("redraw", "cat.safetensors", "mask.png", "a dog")
GROW = ("grow", "cat.safetensors", "a dog", "--top", "2")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("t2i", " "), "prompt is empty"),
        (("t2i", "a cat", "--top-p", "5"), "top p is 5.0"),
        (("t2i", "a cat", "--seed", "-1"), "eed is -1"),
        (("t2i", "a cat", "--pictures", "1000"), "1000 pictures are asked for"),
        (("t2i", "a cat", "--pictures", "0"), "0 pictures are asked for"),
        (("t2i", "a cat", "--width", "100"), "multiples of 32"),
        (("t2i", "a cat", "--guidance", "-2"), "guidance scale is -2"),
        (("t2i", "a cat", "--rescale", "nan"), "rescale is nan"),
        (("t2i", "a cat", "--sprint", "--keep-ratio", "7"), "keep ratio is 7"),
        (("t2i", "a cat", "--thinking", "--thinking-steps", "0"), "steps is 0"),
        (("t2i", "a cat", "--thinking", "--thinking-length", "0"), "0 tokens are asked for"),
        (("t2i", "a cat", "--thinking", "--thinking-temperature", "-1"), "temperature is -1"),
        (("t2i", "a cat", "--decoder-steps", "0"), "steps is 0"),
        (("t2i", "a cat", "--solver", "best"), "There is no solver 'best'"),
        (("t2i", "a cat", "--preset", "fast"), "is of the full decoder"),
        (("t2i", "a cat", "--device", "abacus"), "The device 'abacus' cannot be used"),
        (("t2i", "a cat", "--codes", "codes.png"), "has to end in .safetensors"),
        (("t2i", "a cat", "--confidence", "sure.jpg"), "has to end in .png"),
        (("t2i", "a cat", "-o", "fox.png", "--confidence", "./fox.png"), "would both be written to fox.png"),
        (("understand", "gone.png", "What is it?"), "no picture gone.png"),
        (("understand", "cat.png", "What is it?", "--with", "gone.png"), "no picture gone.png"),
        (("understand", "cat.png", "What is it?", "--sprint", "--keep-ratio", "7"), "keep ratio is 7"),
        (("understand", "cat.png", "What is it?", "--steps", "0"), "steps is 0"),
        (("understand", "cat.png", "What is it?", "--max-new-tokens", "0"), "0 tokens are asked for"),
        (("understand", "cat.png", "What is it?", "--size", "100"), "The size is 100"),
        (("understand", "cat.png", "What is it?", "--device", "abacus"), "The device 'abacus' cannot be used"),
        (("chat", "--top-p", "5"), "top p is 5.0"),
        (("chat", "--sprint", "--warm-up", "0"), "warm up is 0"),
        (("chat", "--max-new-tokens", "0"), "0 tokens are asked for"),
        (("chat", "--image", "gone.png"), "no picture gone.png"),
        (("chat", "--size", "100"), "The size is 100"),
        (("chat", "--device", "abacus"), "The device 'abacus' cannot be used"),
        (("edit", "gone.png", "Make it blue."), "no picture gone.png"),
        ((*EDIT, "--with", "gone.png"), "no picture gone.png"),
        ((*EDIT, "--guidance", "-2"), "text guidance is -2"),
        ((*EDIT, "--image-guidance", "-2"), "image guidance is -2"),
        ((*EDIT, "--threshold", "2"), "threshold is 2"),
        ((*EDIT, "--sprint", "--alpha", "2"), "alpha is 2"),
        ((*EDIT, "--size", "100"), "The size is 100"),
        ((*EDIT, "--decoder-guidance", "-1"), "guidance is -1"),
        (("redraw", "gone.safetensors", "mask.png", "a dog"), "no file gone.safetensors"),
        (("redraw", "gone.png", "mask.png", "a dog"), "no picture gone.png"),
        (("redraw", "cat.png", "gone.png", "a dog"), "no picture gone.png"),
        (("redraw", "cat.png", "empty.png", "a dog"), "covers no code"),
        (("redraw", "cat.safetensors", "dot.png", "a dog"), "covers no code"),
        (("redraw", "cat.safetensors", "white.png", "a dog", "--invert-mask"), "covers no code"),
        ((*REDRAW, "--mask-grow", "-1"), "is to grow by -1 codes; it has to be from 0 to 64"),
        ((*REDRAW, "--mask-grow", "100000"), "is to grow by 100000 codes; it has to be from 0 to 64"),
        ((*REDRAW, "--mask-threshold", "-1"), "mask threshold is -1.0; it has to be from 0.01 to 1"),
        ((*REDRAW, "--mask-threshold", "7"), "mask threshold is 7.0"),
        ((*REDRAW, "--mask-threshold", "nan"), "mask threshold is nan"),
        ((*REDRAW, "--guidance", "-2"), "guidance scale is -2"),
        ((*REDRAW, "--seeing", "picture", "--image-guidance", "-2"), "image guidance is -2"),
        ((*REDRAW, "--temperature", "-1"), "temperature is -1"),
        ((*REDRAW, "--size", "100"), "The size is 100"),
        (("grow", "cat.safetensors", "a dog"), "Nothing is to be added"),
        (("grow", "cat.safetensors", "a dog", "--top", "-2"), "Nothing is to be added"),
        (("grow", "gone.png", "a dog", "--top", "2"), "no picture gone.png"),
        ((*GROW, "--guidance", "-2"), "guidance scale is -2"),
        ((*GROW, "--steps", "0"), "steps is 0"),
        ((*GROW, "--confidence", "nowhere/sure.png"), "its folder has to exist"),
        (("story", "a cat", "--pictures", "0"), "story of 0 pictures"),
        (("story", "a cat", "--text-length", "0"), "The text may have 0 tokens"),
        (("story", "a cat", "--text-steps", "0"), "steps is 0"),
        (("story", "a cat", "--text-temperature", "-1"), "temperature is -1"),
        (("story", "a cat", "--text-guidance", "-2"), "guidance scale is -2"),
        (("story", "a cat", "--image-guidance", "-2"), "image guidance is -2"),
        (("story", "a cat", "--top-k", "-1"), "top k is -1"),
        (("story", "a cat", "--decoder-steps", "0"), "steps is 0"),
        (("story", "a cat", "-o", "cat.png"), "is a file, not a folder"),
        (("encode", "gone.png"), "no picture gone.png"),
        (("encode", "cat.png", "--size", "100"), "The size is 100"),
        (("encode", "cat.png", "--device", "abacus"), "The device 'abacus' cannot be used"),
        (("decode", "gone.safetensors"), "no file gone.safetensors"),
        (("decode", "cat.safetensors", "--decoder-steps", "0"), "steps is 0"),
        (("look", "cat.safetensors", "--pixels", "0"), "1 to 64 pixels"),
        (("bench", "--size", "100"), "multiples of 32"),
        (("bench", "--time-shift", "0"), "time shift is 0"),
        (("bench", "--json", "figures.txt"), "has to end in .json"),
        (("demo", "cat.png"), "is a file, not a folder"),
        (("convert", "someone/model", "full"), "holds something else"),
        (("convert", "someone/model", "cat.png"), "holds something else"),
    ],
)
def test_what_is_wrong_with_the_words_is_said_before_a_model_is_fetched(
    run, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(commands, "_resolve", lambda *_, **__: pytest.fail("the model would be downloaded"))
    noise(64, 64).save("cat.png")
    VQGrid(np.arange(64).reshape(8, 8), 256).save("cat.safetensors")
    for name, side in (("mask", 32), ("dot", 1), ("empty", 0), ("white", 64)):
        mask = Image.new("L", (64, 64))
        mask.paste(255, (0, 0, side, side))
        mask.save(f"{name}.png")
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    there = sorted(Path().rglob("*"))
    status, out, err = run(*words)
    assert status == 1 and err.startswith("llada2-mlx: ") and message in err and err.count("\n") == 1
    assert not out and sorted(Path().rglob("*")) == there


def test_a_mask_that_covers_no_code_is_told_before_the_picture_is_encoded(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imaging, "load_part", lambda *_: pytest.fail("the picture would be encoded"))
    noise(256, 256).save("cat.png")
    mask = Image.new("L", (256, 256))
    mask.putpixel((8, 8), 255)
    mask.save("dot.png")
    status, _, err = run("redraw", "cat.png", "dot.png", "a dog")
    assert status == 1 and "covers no code" in err


def test_a_picture_whose_chunk_ends_too_soon_is_refused_in_words(run) -> None:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "PNG")
    content = file.getvalue()
    at = content.index(b"IDAT") - 4
    length = int.from_bytes(content[at : at + 4], "big")
    Path("damaged.png").write_bytes(content[:at] + (length // 2).to_bytes(4, "big") + content[at + 4 :])
    status, _, err = run("encode", "damaged.png")
    assert status == 1 and "damaged.png cannot be read as a picture (broken PNG file" in err and err.count("\n") == 1


def test_the_process_ends_well(tmp_path: Path) -> None:
    """MLX aborts a process whose threads did not clear their streams."""
    words = ["t2i", "a cat", "--steps", "2", "--decoder-steps", "2", "-o", str(tmp_path / "cat.png")]
    for status, extra in ((0, []), (1, ["--steps", "0"])):
        done = subprocess.run([sys.executable, "-m", "llada2_mlx.cli", *words, *extra], capture_output=True, text=True)
        assert done.returncode == status, done.stderr


def test_a_phones_upright_picture(run) -> None:
    picture = noise(320, 160)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    picture.save("phone.jpg", exif=exif)
    assert "VQGrid(20 x 10 codes" in run("encode", "phone.jpg", "-o", "codes.safetensors")[1]


def test_interrupting_leaves_nothing_behind(tmp_path: Path) -> None:
    picture = tmp_path / "cat.png"
    words = [
        "t2i",
        "A red circle",
        "--width",
        "2816",
        "--height",
        "2816",
        "--steps",
        "32",
        "--threshold",
        "1",
        "-o",
        str(picture),
    ]
    terminal, end = os.openpty()  # bars are shown to a terminal alone
    termios.tcsetwinsize(end, (24, 100))
    process = subprocess.Popen([sys.executable, "-m", "llada2_mlx.cli", *words], stderr=end)
    os.close(end)
    said = ""
    try:
        while "denoising" not in said:
            said += os.read(terminal, 4096).decode(errors="replace")
        process.send_signal(signal.SIGINT)
        with suppress(OSError):  # how a terminal whose other end is closed says so
            while more := os.read(terminal, 4096):
                said += more.decode(errors="replace")
        assert process.wait(timeout=10) == 130 and said.rstrip().endswith("llada2-mlx: stopped")
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    assert not list(tmp_path.iterdir())


def test_the_demo(demo: Demo) -> None:
    assert demo.status == 0 and "Shapes" in demo.said
    page = (demo.folder / "gallery.html").read_text()
    shown = re.findall(r'src="([^"]+)"', page)
    assert len(shown) == len(gallery.PROMPTS) + len({index for index, _ in gallery.QUESTIONS}) + 2 * len(gallery.EDITS)
    assert {path.name for path in demo.folder.iterdir()} == {*shown, "gallery.html", "gallery.png"}
    for text in (*gallery.PROMPTS, *(words for _, words in (*gallery.QUESTIONS, *gallery.EDITS))):
        assert text in page
    with Image.open(demo.folder / "gallery.png") as sheet:
        assert sheet.width > 1000


def test_a_size_that_a_model_was_not_made_for_is_warned_of(run) -> None:
    status, _, err = run("t2i", "a cat", "--width", "512", "--height", "256", "--steps", "1", "--decoder-steps", "2")
    assert status == 0 and "warning: This model was made for drawing at 256 x 256 pixels, and this is 512 x 256" in err


def test_a_picture_is_encoded_at_the_size_that_is_asked_for(run) -> None:
    noise(256, 256).save("picture.png")
    words = ("encode", "picture.png", "-o", "codes.safetensors", "--purpose", "edit", "--size")
    assert "VQGrid(8 x 8 codes" in run(*words, "128")[1]
    assert "VQGrid(16 x 16 codes" in run(*words, "256")[1]
    assert "VQGrid(32 x 32 codes" in run(*words, "0")[1]  # as published
    status, _, err = run(*words, "100")
    assert status == 1 and "The size is 100" in err
