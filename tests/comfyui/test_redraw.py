"""LLaDA2 Redraw and LLaDA2 Grow in a real ComfyUI, on the built-in model, and read by the detector."""

from __future__ import annotations

import numpy as np
import pytest
from client import Comfy, Run, failed, ran, told, workflow
from layouts import DRAWN, layout_of
from PIL import Image

from llada2_mlx.shapes.world import Colour, Kind, Place

TRIANGLE = (Kind.TRIANGLE, Colour.GREEN, Place.TOP_RIGHT)


def picture(comfy: Comfy, run: Run, name: str) -> Image.Image:
    (path,) = [path for path in comfy.images(run) if path.name.startswith(name)]
    with Image.open(path) as image:
        return image.convert("RGB")


def test_a_part_is_drawn_anew_and_every_other_pixel_is_kept(comfy: Comfy) -> None:
    run = ran(comfy.run(workflow("redraw_a_part")))
    before, after = picture(comfy, run, "redraw_before"), picture(comfy, run, "redraw_after")
    assert layout_of(before) == DRAWN and layout_of(after) == {*DRAWN, TRIANGLE}
    changed = (np.asarray(before) != np.asarray(after)).any(axis=-1)
    changed[:128, 128:] = False  # the mask
    assert not changed.any()


def test_the_mask_grows_by_codes(comfy: Comfy) -> None:
    prompt = workflow("redraw_a_part", **{"8": {"mask_grow": 1, "steps": 2}})
    prompt["20"] = {"class_type": "MaskToImage", "inputs": {"mask": ["8", 1]}}
    prompt["21"] = {"class_type": "SaveImage", "inputs": {"images": ["20", 0], "filename_prefix": "llada2/grown_mask"}}
    mask = np.asarray(picture(comfy, ran(comfy.run(prompt)), "grown_mask"))[..., 0] > 0
    expected = np.zeros((256, 256), bool)
    expected[: 128 + 32, 128 - 32 :] = True
    assert (mask == expected).all()


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"6": {"value": 0.0}}, "covers no code"),
        ({"8": {"text": " "}}, "The text is empty"),
    ],
)
def test_what_cannot_be_redrawn_is_a_sentence(comfy: Comfy, unique: str, inputs: dict, sentence: str) -> None:
    prompt = workflow("redraw_a_part", **inputs, **{"2": {"prompt": unique}})
    del prompt["11"]  # which has nothing to do with it
    prompt["10"]["inputs"]["destination"] = ["9", 0]
    if "8" in inputs:
        assert sentence in comfy.refused(prompt)
    else:
        run = comfy.run(prompt)
        assert sentence in failed(run, "8") and "2" not in run.executed  # no picture was made


def test_an_empty_mask_of_a_batch_is_told_before_the_first_picture_is_redrawn(comfy: Comfy) -> None:
    prompt = workflow("redraw_a_part", **{"8": {"vq": ["2", 0]}, "2": {"batch_size": 2}})
    prompt["20"] = {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 64, "height": 64}}
    for number, mask in (("21", ["7", 0]), ("22", ["20", 0])):
        prompt[number] = {"class_type": "MaskToImage", "inputs": {"mask": mask}}
    prompt["23"] = {"class_type": "ImageBatch", "inputs": {"image1": ["21", 0], "image2": ["22", 0]}}
    prompt["24"] = {"class_type": "ImageToMask", "inputs": {"image": ["23", 0], "channel": "red"}}
    prompt["8"]["inputs"]["mask"] = ["24", 0]
    run = comfy.run(prompt)
    assert "The mask of picture 2 covers no code" in failed(run, "8")
    assert not [event for event in run.progress if event["node"] == "8" and event["value"]]


def test_a_mask_of_everything_and_of_another_size(comfy: Comfy) -> None:
    full = {"5": {"value": 1.0, "width": 37, "height": 53}, "7": {"x": 0}, "8": {"steps": 2}}
    run = ran(comfy.run(workflow("redraw_a_part", **full)))
    assert picture(comfy, run, "redraw_after").size == (256, 256)


def test_a_set_of_masks_needs_one_for_each_picture(comfy: Comfy) -> None:
    prompt = workflow("redraw_a_part")
    prompt["20"] = {"class_type": "RepeatImageBatch", "inputs": {"image": ["3", 0], "amount": 2}}
    prompt["21"] = {"class_type": "ImageToMask", "inputs": {"image": ["20", 0], "channel": "red"}}
    prompt["8"]["inputs"]["mask"] = ["21", 0]
    assert "does not fit 1 grids; give one for all, or one for each" in failed(comfy.run(prompt), "8")


def test_another_model_is_refused_before_the_picture_is_made(comfy: Comfy, unique: str) -> None:
    prompt = workflow("redraw_a_part", **{"2": {"prompt": unique}})
    prompt["20"] = {"class_type": "LoadLLaDA2Backbone", "inputs": {"model": "golden", "precision": "auto"}}
    prompt["8"]["inputs"]["backbone"] = ["20", 0]
    prompt["12"]["inputs"]["images"] = ["9", 0]
    del prompt["10"], prompt["11"]
    run = comfy.run(prompt)
    assert failed(run, "8") and "2" not in run.executed


def test_the_least_certain_codes_are_drawn_again(comfy: Comfy) -> None:
    run = ran(comfy.run(workflow("redraw_the_least_certain")))
    assert layout_of(picture(comfy, run, "redraw_the_least_certain")) == DRAWN


def test_a_picture_grows(comfy: Comfy) -> None:
    run = ran(comfy.run(workflow("grow_a_picture")))
    image = picture(comfy, run, "grow_a_picture")
    assert image.size == (256, 256) and layout_of(image) == DRAWN


def test_growing_by_nothing_or_to_a_size_without_a_token_is_a_sentence(comfy: Comfy, unique: str) -> None:
    nothing = workflow("grow_a_picture", **{"2": {"prompt": unique}, "4": {"right": 0}})
    del nothing["5"]  # which can run
    run = comfy.run(nothing)
    assert "Nothing is to be added" in failed(run, "4") and "2" not in run.executed  # no picture was made
    assert "has no size tokens" in failed(comfy.run(workflow("grow_a_picture", **{"4": {"right": 3}})), "4")


def test_a_size_that_the_model_was_not_made_for_is_warned_of(comfy: Comfy) -> None:
    run = ran(comfy.run(workflow("grow_a_picture", **{"4": {"right": 6, "steps": 1}})))
    assert "10" in told(run, "4") and "Warning" in told(run, "4")
