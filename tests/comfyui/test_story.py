"""LLaDA2 Story in a real ComfyUI: on a model that tells a story known here, on Shapes, and on a model of random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

import numpy as np
import pytest
from client import Comfy, Run, failed, ran, told, workflow
from layouts import CIRCLE, DRAWN, layout_of
from PIL import Image
from storyteller import SIZES, TEXTS, codes, write_storyteller

from llada2_mlx.checkpoint.layout import Checkpoint
from llada2_mlx.imaging.look import look, palette
from llada2_mlx.shapes.world import Colour, Kind, Place
from llada2_mlx.story import without_links
from llada2_mlx.vq import VQGrid

ONE_BY_ONE = {"block_length": 1, "steps": 1, "text_steps": 1}
MARKDOWN = f"{TEXTS[0]}\n\n![picture 1](picture_1.png)\n\n{TEXTS[1]}\n\n![picture 2](picture_2.png)\n\n{TEXTS[2]}"


@pytest.fixture(scope="module")
def storyteller(comfy: Comfy) -> Iterator[str]:
    """A model of the user's that came while the server ran."""
    folder = write_storyteller(comfy.base / "models/llada2/storyteller")
    yield folder.name
    shutil.rmtree(folder)


def story(model: str, **inputs) -> dict:
    """A graph that tells a story, saves its codes and its pictures, and shows its texts."""
    graph = workflow("text_to_image", **{"1": {"model": model, "precision": "float32"}})
    defaults = {"pictures": 10, "steps": 8, "text_guidance": 7.5, "image_guidance": 1.5, "seed": 0}
    defaults |= {"temperature": 0.0, "text_temperature": 0.0, "text_steps": 32, "text_length": 8192}
    defaults |= {"picture_codes": 4096, "block_length": 32, "threshold": 0.95, "rescale": 0.7}
    inputs = {"backbone": ["1", 0], "prompt": "A red circle."} | defaults | inputs
    graph["2"] = {"class_type": "LLaDA2Story", "inputs": inputs}
    graph["3"]["inputs"]["vq"] = ["2", 1]
    graph["5"] = {"class_type": "LLaDA2SaveVQ", "inputs": {"vq": ["2", 1], "filename_prefix": "story/codes"}}
    for key, output in (("6", 0), ("7", 2)):
        graph[key] = {"class_type": "PreviewAny", "inputs": {"source": ["2", output]}}
    return graph


def shown(run: Run, key: str) -> list[str]:
    return run.outputs[key]["text"]


def test_the_node_is_there_and_explains_itself(comfy: Comfy) -> None:
    info = comfy.get("/object_info/LLaDA2Story")["LLaDA2Story"]
    assert info["category"] == "LLaDA2" and info["description"] and info["search_aliases"] and info["display_name"]
    assert all(info["output_tooltips"]) and info["output_is_list"] == [True, True, False]
    required, optional = info["input"]["required"], info["input"]["optional"]
    assert all(options.get("tooltip") for _, options in (required | optional).values())
    default = lambda *names: [required[name][1]["default"] for name in names]
    assert default("pictures", "picture_codes", "text_length", "text_steps") == [10, 4096, 8192, 32]
    assert default("text_guidance", "image_guidance", "rescale") == [7.5, 1.5, 0.7]


def test_a_story_of_texts_and_pictures_of_two_sizes(comfy: Comfy, storyteller: str) -> None:
    run = ran(comfy.run(story(storyteller, **ONE_BY_ONE)))
    assert shown(run, "7") == [MARKDOWN]
    assert shown(run, "6") == list(TEXTS)
    saved = run.outputs["5"]["vq"]
    grids = [VQGrid.load(comfy.base / "output" / each["subfolder"] / each["filename"]) for each in saved]
    assert [(grid.codes.shape, grid.to_list()) for grid in grids] == [
        (size, codes(number)) for number, size in enumerate(SIZES)
    ]
    assert {grid.origin.model for grid in grids} == {storyteller}
    # each is decoded on its own
    sizes = []
    for path in comfy.images(run):
        with Image.open(path) as image:
            sizes.append(image.size)
    assert sizes == [(32 * width, 32 * height) for height, width in SIZES]


def test_a_story_shows_as_it_grows(comfy: Comfy, storyteller: str) -> None:
    run = ran(comfy.run(story(storyteller, prompt="Something else.", **ONE_BY_ONE)))
    events = [text for node, text in run.texts if node == "2"]
    notes = [f"Picture {number} is finished: {32 * w} x {32 * h} pixels." for number, (h, w) in enumerate(SIZES, 1)]
    first = next(at for at, text in enumerate(events) if notes[0] in text)
    # the first picture is announced before the second text is there
    assert TEXTS[0] in events[first - 1] and not [text for text in events[: first + 1] if TEXTS[1] in text]
    # what is announced gives way to the story when it ends
    assert events[-2:] == ["\n\n".join([*notes, without_links(MARKDOWN)]), without_links(MARKDOWN)]
    # a link would have the front end ask for a file that is not there
    assert not [text for text in events if "](" in text]
    last = {picture.size: picture for node, picture in run.previews if node == "2"}
    assert list(last) == [(32 * width, 32 * height) for height, width in SIZES]  # what is drawn shows too
    colours = palette(Checkpoint(comfy.base / "models/llada2" / storyteller))
    for number, ((height, width), picture) in enumerate(zip(SIZES, last.values(), strict=True)):
        assert (np.asarray(picture) == look(np.reshape(codes(number), (height, width)), colours, scale=32)).all()
    bars = {event["max"] for event in run.progress if event["node"] == "2"}
    assert {80} <= bars and len(bars) >= 2  # of the pictures, and of the texts


@pytest.mark.parametrize(
    ("limit", "sentence"),
    [
        ({"pictures": 1}, "Warning: The story has 1 picture, which is the limit"),
        ({"text_length": len(TEXTS[0]) + 4}, "Warning: The story was cut off: its text reached the limit"),
    ],
)
def test_a_limit_ends_the_story_and_is_told(comfy: Comfy, storyteller: str, limit: dict, sentence: str) -> None:
    run = ran(comfy.run(story(storyteller, **ONE_BY_ONE, **limit)))
    assert len(comfy.images(run)) == 1 and shown(run, "6") == list(TEXTS[: 1 + ("pictures" in limit)])
    assert sentence in told(run, "2") and TEXTS[0] in told(run, "2")


def test_a_story_without_a_picture_runs_nothing_behind_it(comfy: Comfy, storyteller: str) -> None:
    run = ran(comfy.run(story(storyteller, picture_codes=64, **ONE_BY_ONE)))
    assert shown(run, "7") == [TEXTS[0]] == shown(run, "6")
    assert not comfy.images(run) and "5" not in run.outputs
    assert "before a picture of 320 x 256 pixels (80 codes): the limit is 64 codes" in told(run, "2")


def test_the_shipped_story_has_the_texts_and_pictures_that_its_prompt_asks_for(comfy: Comfy) -> None:
    run = ran(comfy.run(workflow("tell_a_story")))
    ring = (Kind.RING, Colour.GREEN, Place.TOP_RIGHT)
    assert [layout_of(path) for path in comfy.images(run)] == [
        DRAWN,
        {*DRAWN, ring},
        {CIRCLE, ring, (Kind.STAR, Colour.YELLOW, Place.BOTTOM_RIGHT)},
    ]
    (markdown,) = shown(run, "5")
    assert [text for text in markdown.split("\n\n") if not text.startswith("!")] == [
        "A red circle in the top left and a blue star in the bottom right.",
        "A green ring comes to the top right.",
        "The star turns yellow.",
    ]


def test_a_model_that_has_not_learned_it_ends_in_a_sentence_or_a_story(comfy: Comfy) -> None:
    run = comfy.run(story("golden", text_length=96, text_steps=8, pictures=2))
    if run.error:
        assert "The model told neither text nor a picture." in failed(run, "2")
        assert run.error["exception_type"].endswith("RequestError")
    else:
        assert shown(run, "7")[0]


@pytest.mark.parametrize(
    ("inputs", "name"),
    [
        ({"prompt": " \n"}, "prompt"),
        ({"pictures": 0}, "pictures"),
        ({"pictures": 1000}, "pictures"),
        ({"picture_codes": 63}, "picture_codes"),
        ({"text_length": 0}, "text_length"),
        ({"image_guidance": -1.0}, "image_guidance"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_what_is_out_of_range_is_one_error_when_queueing(comfy: Comfy, inputs: dict, name: str) -> None:
    said = json.loads(comfy.refused(story("golden", **inputs)))
    (error,) = said["node_errors"]["2"]["errors"]
    assert error["extra_info"]["input_name"] == name


def test_a_linked_prompt_of_nothing_is_refused_before_any_work(comfy: Comfy) -> None:
    graph = story("golden", prompt=["8", 0])
    graph["8"] = {"class_type": "PrimitiveStringMultiline", "inputs": {"value": " "}}
    run = comfy.run(graph)
    assert "The prompt is empty" in failed(run, "2") and not [each for each in run.progress if each["node"] == "2"]


def test_a_decoder_of_other_codes_is_refused_before_the_story(comfy: Comfy, storyteller: str) -> None:
    graph = story(storyteller, prompt="Never told.")
    graph["3"]["inputs"]["model"] = "Shapes (built in)"
    for key in ("5", "6", "7"):
        del graph[key]
    run = comfy.run(graph)
    assert "codebook" in failed(run, "3") and "2" not in run.executed


def test_a_story_can_be_cancelled(comfy: Comfy, storyteller: str) -> None:
    def press(kind: str, data: dict) -> None:
        if kind == "progress" and data["node"] == "2":
            comfy.post("/interrupt", {})

    run = comfy.run(story(storyteller, prompt="Stopped.", **ONE_BY_ONE), press)
    assert run.interrupted and not run.outputs
    assert shown(ran(comfy.run(story(storyteller, prompt="Stopped.", **ONE_BY_ONE))), "7") == [MARKDOWN]
