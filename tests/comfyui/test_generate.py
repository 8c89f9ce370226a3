"""What LLaDA2 Text to VQ can do beside drawing one picture at once, and SPRINT, in a real ComfyUI."""

from __future__ import annotations

import json

import pytest
from client import Comfy, Run, failed, ran, told, workflow
from layouts import DRAWN, layout_of
from PIL import Image

from llada2_mlx.shapes.detector import read
from llada2_mlx.shapes.grammar import read_plan

THINKING = {"mode": "thinking", "mode.steps": 8, "mode.length": 128, "mode.temperature": 0.0}
SPRINT = {
    "class_type": "LLaDA2Sprint",
    "inputs": {
        "keep_ratio": 0.5,
        "warm_up": 2,
        "alpha": 0.5,
        "text_keep_ratio": 1.0,
        "image_keep_ratio": 0.0,
        "remasking": "low confidence",
    },
}


def pixels(comfy: Comfy, prompt: dict) -> list[bytes]:
    return [Image.open(path).tobytes() for path in comfy.images(ran(comfy.run(prompt)))]


def test_a_graph_of_an_earlier_version_draws_the_same(comfy: Comfy, unique: str) -> None:
    plain = workflow("text_to_image", **{"2": {"prompt": unique}, "3": {"seed": 5}})
    for name in ("mode", "batch_size", "top_k", "top_p"):
        plain["2"]["inputs"].pop(name, None)
    chosen = {"mode": "standard", "batch_size": 1, "top_k": 0, "top_p": 1.0}
    again = workflow("text_to_image", **{"2": {"prompt": unique, **chosen}, "3": {"seed": 5}})
    assert pixels(comfy, plain) == pixels(comfy, again)


def test_a_batch_has_the_pictures_that_each_seed_gives(comfy: Comfy, unique: str) -> None:
    wild = {"prompt": unique, "temperature": 1.5, "top_k": 50, "top_p": 0.99}
    draw = lambda seed, **more: workflow("text_to_image", **{"2": {**wild, "seed": seed, **more}, "3": {"seed": seed}})
    together = pixels(comfy, draw(3, batch_size=2))
    assert together == [*pixels(comfy, draw(3)), *pixels(comfy, draw(4))]
    assert together[0] != together[1]


@pytest.mark.parametrize("size", [0, 1000])
def test_a_batch_of_a_wrong_size_is_one_error(comfy: Comfy, size: int) -> None:
    said = comfy.refused(workflow("text_to_image", **{"2": {"batch_size": size}}))
    (error,) = json.loads(said)["node_errors"]["2"]["errors"]
    assert error["extra_info"]["input_name"] == "batch_size"


def test_top_p_of_nothing_leaves_nothing_to_chance(comfy: Comfy, unique: str) -> None:
    draw = lambda seed: workflow(
        "text_to_image", **{"2": {"prompt": unique, "temperature": 1.0, "top_p": 0.0, "seed": seed}}
    )
    assert pixels(comfy, draw(8)) == pixels(comfy, draw(9))


def test_confidence_has_the_size_of_the_picture(comfy: Comfy, unique: str) -> None:
    prompt = workflow("text_to_image", **{"2": {"prompt": unique}})
    prompt["9"] = {"class_type": "MaskToImage", "inputs": {"mask": ["2", 2]}}
    prompt["4"]["inputs"]["images"] = ["9", 0]
    (path,) = comfy.images(ran(comfy.run(prompt)))
    with Image.open(path) as image:
        assert image.size == (256, 256)
        values = image.convert("L")
        cells = values.resize((8, 8), Image.Resampling.NEAREST)
        assert cells.resize((256, 256), Image.Resampling.NEAREST).tobytes() == values.tobytes()
        assert cells.getextrema()[1] > 200


def test_a_plan_that_begins_no_picture_is_a_sentence(comfy: Comfy, unique: str) -> None:
    run = comfy.run(workflow("text_to_image", **{"2": {"prompt": unique, **THINKING, "mode.length": 2}}))
    said = failed(run, "2")
    assert "The model thought for 2 tokens and began no picture" in said and "Raise the length of thinking" in said


def test_the_shipped_plan_is_what_the_picture_shows(comfy: Comfy) -> None:
    run = ran(comfy.run(workflow("text_to_image_thinking")))
    (plan,), (path,) = run.outputs["5"]["text"], comfy.images(run)
    assert layout_of(path) == DRAWN == read_plan(plan)


def test_a_plan_is_an_output_and_grows(comfy: Comfy) -> None:
    """The golden model, with random weights, begins a picture right after this prompt, without a header."""
    prompt = workflow(
        "text_to_image",
        **{
            "1": {"model": "golden", "precision": "float32"},
            "2": {"prompt": "a fox in the snow", "width": 256, "height": 256, **THINKING},
        },
    )
    prompt["9"] = {"class_type": "PreviewAny", "inputs": {"source": ["2", 1]}}
    run = ran(comfy.run(prompt))
    assert run.outputs["9"]["text"] == [""] and comfy.images(run)
    assert "The model stated no size after thinking" in told(run, "2")
    phases = {(event["node"], event["max"]) for event in run.progress}
    assert len([most for node, most in phases if node == "2"]) >= 2  # a bar for the plan, and one for the picture


def test_a_mode_without_its_inputs_is_refused(comfy: Comfy) -> None:
    assert "mode" in comfy.refused(workflow("text_to_image", **{"2": {"mode": "thinking"}}))
    run = comfy.run(workflow("text_to_image", **{"2": {"mode": "dreaming"}}))
    assert "The mode has to be standard or thinking" in failed(run, "2") and not run.progress


def test_sprint_draws_and_answers(comfy: Comfy, unique: str) -> None:
    prompt = workflow("text_to_image", **{"2": {"prompt": unique, "sprint": ["8", 0]}}) | {"8": SPRINT}
    (path,) = comfy.images(ran(comfy.run(prompt)))
    with Image.open(path) as image:
        assert read(image) is not None
    asked = workflow("ask_about_a_picture", **{"5": {"sprint": ["8", 0], "max_new_tokens": 64}}) | {"8": SPRINT}
    assert ran(comfy.run(asked)).outputs["6"]["text"][0]


def test_an_edit_says_that_it_ran_without_sprint(comfy: Comfy) -> None:
    plain = ran(comfy.run(workflow("edit_a_picture", **{"5": {"steps": 2}})))
    sprinting = ran(comfy.run(workflow("edit_a_picture", **{"5": {"steps": 2, "sprint": ["98", 0]}}) | {"98": SPRINT}))
    assert "SPRINT is not used in editing" in told(sprinting, "5")
    assert [path.name[:5] for path in comfy.images(plain)] == [path.name[:5] for path in comfy.images(sprinting)]
    last = lambda run: Image.open(comfy.images(run)[-1]).tobytes()
    assert last(plain) == last(sprinting)


def test_several_pictures_are_drawn_together(comfy: Comfy) -> None:
    pictures = pixels(comfy, workflow("draw_several_pictures"))
    assert len(pictures) == 4 and len(set(pictures)) == 4


def test_codes_appear_while_they_are_drawn(comfy: Comfy, unique: str) -> None:
    slow = {"prompt": unique, "steps": 32, "threshold": 1.0}
    _check_appearing(ran(comfy.run(workflow("text_to_image", **{"2": slow}))), "2")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("edit_a_picture", "LLaDA2Edit"), ("redraw_a_part", "LLaDA2Redraw"), ("grow_a_picture", "LLaDA2Grow")],
)
def test_codes_appear_while_a_picture_is_changed(comfy: Comfy, name: str, kind: str) -> None:
    prompt = workflow(name)
    (node,) = (number for number, each in prompt.items() if each["class_type"] == kind)
    prompt[node]["inputs"] |= {"steps": 32, "threshold": 1.0, "seed": 77}
    _check_appearing(ran(comfy.run(prompt)), node)


def test_a_plan_grows_on_the_node(comfy: Comfy, unique: str) -> None:
    prompt = workflow("text_to_image_thinking", **{"2": {"prompt": unique, "threshold": 1.0}})
    prompt["90"] = {"class_type": "PreviewAny", "inputs": {"source": ["2", 1]}}
    run = ran(comfy.run(prompt))
    (plan,) = run.outputs["90"]["text"]
    texts = list(dict.fromkeys(text for node, text in run.texts if node == "2"))
    assert plan and plan in texts[-1]
    growing = [text for text in texts[:-1] if "…" in text]
    assert len(growing) >= 2 and not any(plan in text for text in growing)


def _check_appearing(run: Run, node: str) -> None:
    """What a node showed of a picture while it drew it: ever fewer cells that are still to be drawn, and in the end none."""
    shown = [picture for at, picture in run.previews if at == node]
    assert 2 <= len(shown) and {picture.size for picture in shown} == {(256, 256)}
    grey = [_masked(picture) for picture in shown]
    assert grey == sorted(grey, reverse=True) and grey[0] > grey[-1] == 0


def _masked(picture: Image.Image) -> int:
    """Cells with the two greys that a cell which is to be drawn is hatched in."""
    cells = [picture.crop((x, y, x + 32, y + 32)) for x in range(0, 256, 32) for y in range(0, 256, 32)]
    return sum({colour for _, colour in cell.getcolors()} == {(72, 72, 72), (152, 152, 152)} for cell in cells)
