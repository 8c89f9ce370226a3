"""The nodes inside a real ComfyUI, over HTTP and websocket."""

from __future__ import annotations

import json
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from client import DYNAMIC, PACK, Comfy, api_graph, failed, ran, told, workflow
from layouts import DRAWN, STAR, layout_of
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from templates import TEMPLATES, WORKFLOWS

from llada2_mlx.checkpoint.layout import BUILT_IN
from llada2_mlx.shapes.world import Colour, Kind, Place

NODES = [
    "LoadLLaDA2Backbone",
    "SigLIPVQEncode",
    "LLaDA2JoinVQ",
    "LLaDA2TextToVQ",
    "LLaDA2Understand",
    "LLaDA2Chat",
    "LLaDA2Edit",
    "LLaDA2Redraw",
    "LLaDA2Grow",
    "LLaDA2Sprint",
    "ZImageDecode",
    "LLaDA2LoadZImageDecoder",
    "LLaDA2VQToConditioning",
]
EDITED = {(Kind.CIRCLE, Colour.YELLOW, Place.TOP_LEFT), STAR}
SECOND = {(Kind.RING, Colour.GREEN, Place.TOP_RIGHT), (Kind.TRIANGLE, Colour.PURPLE, Place.BOTTOM_LEFT)}
ANSWER = "A red circle in the top left and a blue star in the bottom right, on a plain white background."
NAMES = sorted(set(TEMPLATES.values()))
# run by tests of their own, because they show something else
OTHERS = {
    "codes_as_things",
    "draw_several_pictures",
    "edit_with_a_reference",
    "flip_and_stitch",
    "grow_a_picture",
    "redraw_a_part",
    "redraw_the_least_certain",
    "tell_a_story",
    "text_to_image_thinking",
}


@pytest.mark.parametrize("name", NODES)
def test_a_node_is_there_and_explains_itself(comfy: Comfy, name: str) -> None:
    info = comfy.get(f"/object_info/{name}")[name]
    assert info["category"] == "LLaDA2" and info["description"] and info["search_aliases"] and info["display_name"]
    assert all(info["output_tooltips"])
    inputs = {**info["input"]["required"], **info["input"].get("optional", {})}
    for kind, *options in list(inputs.values()):
        for choice in options[0]["options"] if kind == DYNAMIC else ():
            inputs |= choice["inputs"].get("required", {})
    assert all(options.get("tooltip") for _, options in inputs.values()), name


def test_defaults_are_the_models_own(comfy: Comfy) -> None:
    default = lambda node, name: comfy.get(f"/object_info/{node}")[node]["input"]["required"][name][1]["default"]
    assert [default("LLaDA2TextToVQ", name) for name in ("width", "height", "steps", "guidance", "temperature")] == [
        0,
        0,
        8,
        2.0,
        0.0,
    ]
    assert [default("LLaDA2TextToVQ", name) for name in ("block_length", "threshold", "rescale")] == [32, 0.95, 0.7]
    assert [default("LLaDA2Understand", name) for name in ("steps", "max_new_tokens")] == [32, 2048]
    assert [default("LLaDA2Edit", name) for name in ("steps", "text_guidance", "image_guidance")] == [8, 4.0, 0.0]
    assert [default("ZImageDecode", name) for name in ("guidance", "upscale")] == [1.0, 2]
    options = comfy.get("/object_info/ZImageDecode")["ZImageDecode"]["input"]["required"]["decoder"][1]["options"]
    steps = {option["key"]: option["inputs"]["required"]["steps"][1]["default"] for option in options}
    assert steps == {"full": 50, "turbo": 8}


def test_the_models_that_are_offered(comfy: Comfy) -> None:
    for node in ("LoadLLaDA2Backbone", "SigLIPVQEncode", "ZImageDecode", "LLaDA2LoadZImageDecoder"):
        options = comfy.get(f"/object_info/{node}")[node]["input"]["required"]["model"][1]["options"]
        assert [option for option in options if not option.endswith("own")] == [
            "Shapes (built in)",
            "empty",
            "golden",
            "models--someone--shapes",
            "partial",
            "inclusionAI/LLaDA2.0-Uni",
        ]


def test_a_model_in_the_hubs_cache_that_extra_model_paths_names(comfy: Comfy, unique: str) -> None:
    elsewhere = {"model": "models--someone--shapes"}
    run = ran(comfy.run(workflow("text_to_image", **{"1": elsewhere, "2": {"prompt": unique}, "3": elsewhere})))
    assert {"1", "3"} <= set(run.executed) and comfy.images(run)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OTHERS])
def test_a_shipped_workflow_runs_to_its_end(comfy: Comfy, name: str) -> None:
    run = ran(comfy.run(workflow(name)))
    saves = [node for node in workflow(name).values() if node["class_type"] in ("SaveImage", "PreviewImage")]
    images = comfy.images(run)
    assert len(images) == len(saves)
    for path in images:
        with Image.open(path) as image:
            assert image.width >= 256
        edited = name in ("edit_a_picture", "refine_a_photo") and "after" in path.name
        allowed = [EDITED] if edited else [DRAWN, SECOND] if name == "ask_about_two_pictures" else [DRAWN]
        assert layout_of(path) in allowed, path.name
    if name == "ask_about_a_picture":
        assert run.outputs["6"]["text"] == [ANSWER]


def test_the_upscaled_picture_is_twice_as_large(comfy: Comfy) -> None:
    (path,) = comfy.images(ran(comfy.run(workflow("text_to_image_upscale"))))
    with Image.open(path) as image:
        assert image.size == (512, 512)


def test_a_second_run_reuses_what_did_not_change(comfy: Comfy, unique: str) -> None:
    draw = lambda **decode: workflow("text_to_image", **{"2": {"prompt": unique}, "3": decode})
    first = ran(comfy.run(draw(seed=1)))
    assert {"2", "3", "4"} <= set(first.executed)
    again = ran(comfy.run(draw(seed=1)))
    assert {"1", "2", "3"} <= set(again.cached)
    other = ran(comfy.run(draw(seed=2)))
    assert {"1", "2"} <= set(other.cached) and {"3", "4"} <= set(other.executed) and "2" not in other.executed
    assert comfy.images(first)[0].read_bytes() != comfy.images(other)[0].read_bytes()


def test_progress_arrives_for_tokens_and_for_pixels(comfy: Comfy, unique: str) -> None:
    run = ran(comfy.run(workflow("text_to_image", **{"2": {"prompt": unique}})))
    for node in ("2", "3"):
        own = [event for event in run.progress if event["node"] == node]
        assert own and own[-1]["value"] <= own[-1]["max"]


def test_the_bar_starts_again_after_the_weights_were_loaded(comfy: Comfy, unique: str) -> None:
    ran(comfy.run(workflow("text_to_image", **{"2": {"prompt": f"{unique} (first)"}})))
    comfy.free(1)
    run = ran(comfy.run(workflow("text_to_image", **{"2": {"prompt": unique}})))
    own = [(event["value"], event["max"]) for event in run.progress if event["node"] == "2"]
    weights, denoising = own[0][1], own[-1][1]
    assert weights != denoising and (1, weights) in own and (1, denoising) in own


def test_the_picture_appears_while_it_is_decoded(comfy: Comfy, unique: str) -> None:
    """In its own colours, before it is there: 32 x 32 latents, enlarged. What is seen last, which stays, is the picture."""
    decoding = {"decoder": "full", "decoder.steps": 40, "decoder.solver": "euler"}
    striped = {
        "prompt": "A large red circle in the top left and a small blue star in the bottom right, on grey stripes"
    }
    slow = workflow("text_to_image", **{"2": striped, "3": decoding})  # a flat picture is there from the first on
    slow["3"]["inputs"].pop("decoder.sampler")
    run = ran(comfy.run(slow))
    seen = [picture for node, picture in run.previews if node == "3"]
    assert len(seen) > 2 and all(picture.size == (512, 512) for picture in seen)
    *seen, last = seen
    with Image.open(*comfy.images(run)) as image:
        drawn = image.convert("RGB").resize((512, 512))
    alike = lambda one, other: np.corrcoef(np.ravel(one), np.ravel(other))[0, 1]
    assert alike(last, drawn) > 0.99
    # the colours are those of a linear map, so that they are not exact; where they are is
    assert alike(seen[-1], drawn) > max(0.6, alike(seen[0], drawn), alike(seen[-1], ImageOps.mirror(drawn)))


def test_the_answer_grows_on_the_canvas(comfy: Comfy) -> None:
    asked = {"question": "Describe the picture.", "max_new_tokens": 256, "threshold": 1.0}
    run = ran(comfy.run(workflow("ask_about_a_picture", **{"5": asked})))
    texts = [text for node, text in run.texts if node == "5"]
    assert len(texts) > 1 and len(set(texts)) > 1
    assert texts[-1] == run.outputs["6"]["text"][0]  # nothing of it is left unfinished


def test_cancel_ends_within_a_step_and_the_next_run_works(comfy: Comfy, unique: str) -> None:
    slow = workflow("edit_a_picture", **{"5": {"instruction": unique, "threshold": 1.0, "steps": 32}})
    asked = []

    def cancel(kind: str, data: dict) -> None:
        if kind == "progress" and data["node"] == "5" and data["value"] < data["max"] and not asked:
            asked.append(time.monotonic())
            comfy.post("/interrupt", {})

    run = comfy.run(slow, cancel)
    assert asked and run.interrupted and run.error["node_id"] == "5"
    assert time.monotonic() - asked[0] < 5
    ran(comfy.run(workflow("text_to_image", **{"2": {"prompt": unique}})))


def test_cancel_while_decoding(comfy: Comfy, unique: str) -> None:
    slow = workflow("text_to_image", **{"3": {"decoder": "full", "decoder.steps": 900, "decoder.solver": "euler"}})
    slow["3"]["inputs"].pop("decoder.sampler")
    asked = []

    def cancel(kind: str, data: dict) -> None:
        if kind == "progress" and data["node"] == "3" and data["max"] > 800 and not asked:
            asked.append(time.monotonic())
            comfy.post("/interrupt", {})

    run = comfy.run(slow, cancel)
    assert run.interrupted and time.monotonic() - asked[0] < 5
    ran(comfy.run(workflow("text_to_image", **{"3": {"seed": 77}})))


@pytest.mark.parametrize(("decoder", "inputs"), [
    ("full", {"steps": 3, "solver": "midpoint"}),
    ("turbo", {"steps": 3, "sampler": "as published"}),
])  # fmt: skip
def test_both_decoders(comfy: Comfy, decoder: str, inputs: dict) -> None:
    prompt = workflow("text_to_image")
    own = prompt["3"]["inputs"]
    for name in [name for name in own if name.startswith("decoder")]:
        del own[name]
    own |= {"decoder": decoder} | {f"decoder.{name}": value for name, value in inputs.items()}
    (path,) = comfy.images(ran(comfy.run(prompt)))
    with Image.open(path) as image:
        assert image.size == (256, 256)


def test_a_batch_gives_a_batch(comfy: Comfy) -> None:
    prompt = workflow("ask_about_a_picture", **{"5": {"max_new_tokens": 16}})
    prompt["7"] = {"class_type": "RepeatImageBatch", "inputs": {"image": ["3", 0], "amount": 2}}
    prompt["4"]["inputs"]["image"] = ["7", 0]
    prompt["8"] = {"class_type": "ZImageDecode", "inputs": workflow("text_to_image")["3"]["inputs"] | {"vq": ["4", 0]}}
    prompt["9"] = {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "llada2/batch"}}
    run = ran(comfy.run(prompt))
    assert len(run.outputs["6"]["text"]) == 2  # one answer a picture
    first, second = comfy.images(run)
    # picture i uses seed + i
    prompt["4"]["inputs"]["image"], prompt["8"]["inputs"]["seed"] = ["3", 0], 1
    (alone,) = comfy.images(ran(comfy.run(prompt)))
    pixels = [Image.open(path).tobytes() for path in (first, second, alone)]
    assert pixels[0] != pixels[1] == pixels[2]


@pytest.mark.parametrize("title", TEMPLATES)
def test_an_editor_workflow_is_the_api_graph(comfy: Comfy, title: str) -> None:
    """Nodes, inputs and values that exist, in the order of the widgets, and the same graph as the API file."""
    editor = json.loads((WORKFLOWS / f"{title}.json").read_text())
    # a picture of the user's waits beside the graph
    nodes = [node for node in editor["nodes"] if node["type"] not in ("MarkdownNote", "LoadImage")]
    graph, varied = api_graph(comfy, nodes, {link[0]: [str(link[1]), link[2]] for link in editor["links"]})
    assert graph == {
        key: {"class_type": node["class_type"], "inputs": node["inputs"]}
        for key, node in workflow(TEMPLATES[title]).items()
    }
    (note,) = [node for node in editor["nodes"] if node["type"] == "MarkdownNote"]
    assert varied.count("randomize") == 1  # Run again draws a variation: the last decoder's seed
    needs_a_picture = any(node["class_type"] == "SigLIPVQEncode" for node in graph.values())
    assert ("Load Image" in note["widgets_values"][0]) == needs_a_picture
    assert any(node["type"] == "LoadImage" for node in editor["nodes"]) == needs_a_picture


# the heights that nodes take in Nodes 2.0 with the picture and the text that they show, as measured in a browser
TALL = {
    "LoadLLaDA2Backbone": 240,
    "LLaDA2TextToVQ": 726,
    "LLaDA2Edit": 642,
    "LLaDA2Redraw": 642,
    "LLaDA2Grow": 754,
    "LLaDA2Story": 860,
    "LLaDA2Understand": 400,
    "LLaDA2Chat": 450,
    "SigLIPVQEncode": 242,
    "ZImageDecode": 534,
    "LLaDA2LookAtVQ": 430,
    "LLaDA2CropVQ": 254,
    "LLaDA2PasteVQ": 254,
    "LLaDA2LoadZImageDecoder": 262,
    "KSampler": 480,
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_no_node_of_a_template_hides_another(template: str) -> None:
    """With the room that its text and its picture take, which come when the node has something to show."""
    title, text, gap = 30, 60, 10  # pixels
    boxes = []
    for node in json.loads((WORKFLOWS / f"{template}.json").read_text())["nodes"]:
        (left, top), (width, height) = node["pos"], node["size"]
        if node["type"] in TALL:
            height = max(height, TALL[node["type"]])
        elif node["type"] not in ("MarkdownNote", "LoadImage", "SaveImage", "PreviewImage"):
            height += text
        boxes.append((left, top - title, left + width + gap, top + height + gap))
    for one, other in combinations(boxes, 2):
        apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        assert apart, (one, other)
    assert max(box[2] for box in boxes) - gap <= 2080  # else the classic canvas opens too small for words


# --- what is refused ------------------------------------------------------------------------------------------------


def faults(said: str) -> list[tuple[str, str]]:
    """Node and widget of each error in a refusal."""
    nodes = json.loads(said)["node_errors"].items()
    return [(node, error["extra_info"]["input_name"]) for node, errors in nodes for error in errors["errors"]]


@pytest.mark.parametrize(("side", "sentence"), [(8192, "bigger than max of 8128"), (-64, "smaller than min of 0")])
def test_a_size_out_of_bounds_is_one_error_on_its_widget(comfy: Comfy, side: int, sentence: str) -> None:
    for name in ("width", "height"):
        said = comfy.refused(workflow("text_to_image", **{"2": {name: side}}))
        assert sentence in said and faults(said) == [("2", name)]


@pytest.mark.parametrize(
    ("name", "node", "inputs"),
    [
        ("text_to_image", "2", {"prompt": " "}),
        ("text_to_image", "1", {"model": "gone"}),
        ("text_to_image", "3", {"model": "gone"}),
        ("picture_through_codes", "4", {"model": "gone"}),
    ],
)
def test_one_fault_is_one_error_on_its_widget(comfy: Comfy, name: str, node: str, inputs: dict) -> None:
    prompt = workflow(name, **{node: inputs})
    if name == "picture_through_codes":
        del prompt["6"]
    assert faults(comfy.refused(prompt)) == [(node, *inputs)]


@pytest.mark.parametrize("side", [100, 255, 300])
def test_a_size_between_the_steps_is_refused_before_anything_is_drawn(comfy: Comfy, side: int) -> None:
    for name in ("width", "height"):
        run = comfy.run(workflow("text_to_image", **{"2": {name: side}}))
        sentence = f"The {name} is {side}; it has to be 0 (the model's own size) or a multiple of 64 from 256 to 8128"
        assert sentence in failed(run, "2") and not run.progress
        assert any(sentence in text for node, text in run.texts if node == "2")


def test_stepping_up_from_0_goes_through_no_forbidden_size(comfy: Comfy) -> None:
    for side in (64, 192):
        ran(comfy.run(workflow("text_to_image", **{"2": {"width": side, "height": side}})))


@pytest.mark.parametrize(
    ("name", "node", "inputs", "sentence"),
    [
        ("text_to_image", "2", {"prompt": "  "}, "The prompt is empty."),
        ("ask_about_a_picture", "5", {"question": ""}, "The question is empty."),
        ("edit_a_picture", "5", {"instruction": "\n"}, "The instruction is empty."),
        ("text_to_image", "1", {"model": "gone"}, "There is no model 'gone'. There are: Shapes"),
        ("text_to_image", "1", {"model": "empty"}, "has no complete backbone"),
        ("picture_through_codes", "4", {"model": "empty"}, "has no complete image tokenizer"),
        ("text_to_image", "2", {"steps": 0}, "smaller than min"),
        ("text_to_image", "1", {"precision": "int3"}, "not in"),
        ("text_to_image", "2", {"width": "wide"}, "Failed to convert an input value to a INT value"),
        ("text_to_image", "3", {"model": "empty"}, "has no complete VAE"),
        ("text_to_image", "1", {"model": ["not", "a", "name"]}, "must be a length-2 list"),
        ("text_to_image", "1", {"model": {"a": 1}}, "There is no model {'a': 1}"),
    ],
)
def test_what_can_be_checked_is_refused_when_queueing(
    comfy: Comfy, name: str, node: str, inputs: dict, sentence: str
) -> None:
    prompt = workflow(name, **{node: inputs})
    before = {"ask_about_a_picture": "9", "edit_a_picture": "7", "picture_through_codes": "6"}.get(name)
    prompt.pop(before, None)  # saves the first picture, which nothing is wrong with, and ComfyUI would run that much
    assert sentence in comfy.refused(prompt)


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"model": "partial"}, "has no complete turbo decoder: decoder-turbo/config.json"),
        ({"decoder": "huge"}, "The decoder has to be full or turbo"),
        ({"decoder": None}, "The decoder has to be full or turbo"),
        ({"upscale": 1}, "upscale is 1, and this model's decoders were made for 2 alone. Set it to 2."),
        ({"model": "the codes' own", "upscale": 1}, "upscale is 1"),
        ({"model": "golden"}, "The codes are of the model Shapes (built in), and golden has another codebook."),
        ({"model": "damaged-decoder"}, "truncated or damaged"),
    ],
)
def test_a_decoder_that_cannot_be_used_is_refused_before_anything_is_drawn(
    comfy: Comfy, unique: str, inputs: dict, sentence: str
) -> None:
    damaged(comfy, "damaged-decoder", "decoder-turbo/decoder_model.safetensors")
    run = comfy.run(workflow("text_to_image", **{"2": {"prompt": unique}, "3": inputs}))
    assert sentence in failed(run, "3") and "2" not in run.executed


def damaged(comfy: Comfy, name: str, *files: str) -> None:
    """A copy of the built-in model with some files cut short."""
    folder = comfy.base / "models/llada2" / name
    for path in BUILT_IN.rglob("*.*"):
        own = folder / path.relative_to(BUILT_IN)
        own.parent.mkdir(parents=True, exist_ok=True)
        if not own.exists():
            if str(path.relative_to(BUILT_IN)) in files:
                own.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            else:
                own.symlink_to(path)


def test_a_model_without_the_decoder_is_refused_before_its_codes_are_drawn(comfy: Comfy, unique: str) -> None:
    chosen = {"1": {"model": "partial"}, "2": {"prompt": unique}, "3": {"model": "the codes' own"}}
    run = comfy.run(workflow("text_to_image", **chosen))
    assert "has no complete turbo decoder" in failed(run, "3") and "2" not in run.executed


def test_a_choice_between_links_is_refused_only_if_no_link_will_do(comfy: Comfy, unique: str) -> None:
    prompt = workflow("text_to_image", **{"2": {"prompt": unique}, "3": {"model": "the codes' own"}})
    prompt["7"] = {"class_type": "LoadLLaDA2Backbone", "inputs": prompt["1"]["inputs"] | {"model": "partial"}}
    prompt["8"] = {"class_type": "LLaDA2TextToVQ", "inputs": prompt["2"]["inputs"] | {"backbone": ["7", 0]}}
    choice = {"switch": False, "on_false": ["2", 0], "on_true": ["8", 0]}
    prompt["9"] = {"class_type": "ComfySwitchNode", "inputs": choice}
    prompt["3"]["inputs"]["vq"] = ["9", 0]
    ran(comfy.run(prompt))
    choice["on_false"] = ["8", 0]
    assert "has no complete turbo decoder" in failed(comfy.run(prompt), "3")


def test_an_encoder_of_other_codes_is_refused_before_the_picture_is_made(comfy: Comfy, unique: str) -> None:
    for name, node in (("ask_about_a_picture", "5"), ("edit_a_picture", "5")):
        prompt = workflow(name, **{"2": {"prompt": unique}, "4": {"model": "golden"}})
        prompt = {key: each for key, each in prompt.items() if each["class_type"] != "PreviewImage"}
        saves = [key for key, each in prompt.items() if each["class_type"] == "SaveImage"]
        for key in saves[:-1] if name == "edit_a_picture" else saves:
            del prompt[key]
        run = comfy.run(prompt)
        assert "of the model golden, and shapes has another codebook" in failed(run, node) and "2" not in run.executed


def test_words_that_the_toy_does_not_know_are_warned_of(comfy: Comfy, unique: str) -> None:
    asked = {"2": {"prompt": "A fox in the snow. (7)", "steps": 1}, "3": {"decoder.steps": 2}}
    text = told(ran(comfy.run(workflow("text_to_image", **asked))), "2")
    assert "shapes is a toy, and these words are none of its own: fox, snow." in text and "It knows circles" in text
    asked["2"]["prompt"] = "A red circle in the top left, on a plain white background. (7)"
    assert told(ran(comfy.run(workflow("text_to_image", **asked))), "2") == " "
    run = ran(comfy.run(workflow("ask_about_a_picture", **{"5": {"question": "Is it a dog? Describe the picture."}})))
    assert "own: dog." in told(run, "5") and told(run, "5").endswith(f"\n\n{run.outputs['6']['text'][0]}")


def test_the_model_is_chosen_once(comfy: Comfy, unique: str) -> None:
    own = {"4": {"model": "the backbone's own", "backbone": ["1", 0]}, "6": {"model": "the codes' own"}}
    elsewhere = {"1": {"model": "models--someone--shapes"}, "3": {"model": "the codes' own"}, **own}
    run = ran(comfy.run(workflow("edit_a_picture", **{"2": {"prompt": unique}, **elsewhere})))
    assert len(comfy.images(run)) == 2
    prompt = workflow("edit_a_picture", **own)
    del prompt["4"]["inputs"]["backbone"]
    assert "No backbone is linked" in failed(comfy.run(prompt), "4")


def test_a_model_with_as_many_codes_of_another_kind_is_refused(comfy: Comfy, unique: str) -> None:
    folder = comfy.base / "models/llada2/stranger"
    (folder / "image_tokenizer").mkdir(parents=True)
    for part in BUILT_IN.iterdir():
        if part.name != "image_tokenizer":
            (folder / part.name).symlink_to(part)
    for part in (BUILT_IN / "image_tokenizer").iterdir():
        if part.suffix != ".safetensors":
            (folder / "image_tokenizer" / part.name).symlink_to(part)
    weights = load_file(BUILT_IN / "image_tokenizer/image_tokenizer.safetensors")
    name = "model.vqmodel.quantize.embedding.weight"
    save_file(weights | {name: -weights[name]}, folder / "image_tokenizer/image_tokenizer.safetensors")
    run = comfy.run(workflow("text_to_image", **{"2": {"prompt": unique}, "3": {"model": "stranger"}}))
    assert "stranger has another codebook. Use one model for all nodes" in failed(run, "3")


def test_the_other_parts_of_an_incomplete_model_work(comfy: Comfy) -> None:
    chosen = {"1": {"model": "partial"}, "3": {"model": "Shapes (built in)"}}  # a copy has the same codes
    ran(comfy.run(workflow("text_to_image", **chosen)))


def test_a_size_without_a_token_is_refused_before_any_step(comfy: Comfy) -> None:
    # the golden tokenizer's sizes end at 64 codes
    run = comfy.run(workflow("text_to_image", **{"1": {"model": "golden"}, "2": {"width": 2112, "height": 256}}))
    assert "A grid of 8 x 66 codes (height x width) has no size tokens in the model golden" in failed(run, "2")
    assert "The largest is 2048 pixels of a drawn picture (32 per code)" in failed(run, "2")
    assert not [event for event in run.progress if event["node"] == "2"]


def test_a_size_that_the_model_was_not_made_for_is_warned_of(comfy: Comfy, unique: str) -> None:
    asked = {"2": {"prompt": unique, "width": 512, "steps": 1}, "3": {"decoder.steps": 2}}
    run = ran(comfy.run(workflow("text_to_image", **asked)))
    for node in ("2", "3"):
        assert any("made for drawing at 256 x 256" in text for name, text in run.texts if name == node)
    run = ran(comfy.run(workflow("ask_about_a_picture", **{"2": {"prompt": unique}, "4": {"size": 128}})))
    for node in ("4", "5"):
        assert any("made for understanding at 256 x 256" in text for name, text in run.texts if name == node)
    run = comfy.run(workflow("ask_about_a_picture", **{"2": {"prompt": unique}, "4": {"size": 132}}))
    assert "The size is 132; it has to be" in failed(run, "4")


def test_a_warning_goes_when_it_no_longer_holds(comfy: Comfy, unique: str) -> None:
    asked = {"2": {"prompt": unique, "width": 512, "steps": 1}, "3": {"decoder.steps": 2}}
    ran(comfy.run(workflow("text_to_image", **asked)))
    asked["2"]["width"] = 256
    run = ran(comfy.run(workflow("text_to_image", **asked)))
    for node in ("2", "3"):
        assert {text for name, text in run.texts if name == node} == {" "}  # one space clears


def test_texts_go_to_the_client_of_the_prompt_alone(comfy: Comfy, unique: str) -> None:
    prompt = workflow("text_to_image", **{"2": {"prompt": unique, "width": 512, "steps": 1}})
    onlooker = Comfy(int(comfy.address.partition(":")[2]), comfy.base, comfy.log_path, comfy.process)
    texts = []

    def queue(kind: str, data: dict) -> None:
        if kind == "execution_start" and not texts:
            texts.append(onlooker.post("/prompt", {"prompt": prompt})["prompt_id"])  # no client, as from curl

    ran(comfy.run(workflow("text_to_image", **{"2": {"prompt": f"{unique} 2"}}), queue))
    run = ran(comfy.run(workflow("text_to_image", **{"2": {"prompt": f"{unique} 3"}})))  # waits for the one before
    assert onlooker._history(texts[0])["status"]["status_str"] == "success"
    assert not [text for _, text in run.texts if "made for" in text]


def test_an_error_is_a_sentence_on_its_node(comfy: Comfy) -> None:
    run = comfy.run(workflow("text_to_image", **{"3": {"model": "golden"}}))
    assert any("golden has another codebook" in text for name, text in run.texts if name == "3")


def test_linked_text_is_checked_first_thing_in_the_run(comfy: Comfy) -> None:
    prompt = workflow("text_to_image")
    prompt["9"] = {"class_type": "PrimitiveString", "inputs": {"value": " "}}
    prompt["2"]["inputs"]["prompt"] = ["9", 0]
    assert "The prompt is empty." in failed(comfy.run(prompt), "2")


@pytest.mark.parametrize("side", [100, -64, 1184])
def test_a_linked_size_follows_the_same_rule(comfy: Comfy, side: int) -> None:
    prompt = workflow("text_to_image")
    prompt["9"] = {"class_type": "PrimitiveInt", "inputs": {"value": side}}
    prompt["2"]["inputs"]["height"] = ["9", 0]
    assert f"The height is {side}; it has to be 0" in failed(comfy.run(prompt), "2")


def test_a_missing_input_is_named(comfy: Comfy) -> None:
    for node, name in (("1", "model"), ("2", "prompt"), ("3", "model")):
        prompt = workflow("text_to_image")
        del prompt[node]["inputs"][name]
        assert "Required input is missing" in comfy.refused(prompt)


def test_a_damaged_vae_is_found_before_the_decoder_works(comfy: Comfy) -> None:
    folder = comfy.base / "models/llada2/damaged-vae"
    (folder / "vae").mkdir(parents=True)
    for part in BUILT_IN.iterdir():
        if part.name != "vae":
            (folder / part.name).symlink_to(part)
    name = "vae/diffusion_pytorch_model.safetensors"
    (folder / "vae/config.json").symlink_to(BUILT_IN / "vae/config.json")
    (folder / name).write_bytes((BUILT_IN / name).read_bytes()[:3000])
    said = comfy.refused(workflow("text_to_image", **{"3": {"model": "damaged-vae"}}))
    assert "truncated or damaged" in said and faults(said) == [("3", "model")]


def test_a_prompt_that_is_too_long(comfy: Comfy) -> None:
    assert "and the model takes 8192" in failed(
        comfy.run(workflow("text_to_image", **{"2": {"prompt": "x" * 10_000}})), "2"
    )


def test_a_grid_of_another_model_is_refused(comfy: Comfy) -> None:
    for name, node, inputs in (("text_to_image", "3", {"3": {}}), ("ask_about_a_picture", "5", {"4": {}})):
        (chosen,) = inputs
        run = comfy.run(workflow(name, **{chosen: {"model": "golden"}}))
        assert "has another codebook. Use one model for all nodes of a graph." in failed(run, node)


def test_a_thin_picture_is_refused(comfy: Comfy) -> None:
    prompt = workflow("ask_about_a_picture")
    prompt["7"] = {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 1024, "batch_size": 1, "color": 0}}
    prompt["4"]["inputs"]["image"] = ["7", 0]
    assert "too thin to understand" in failed(comfy.run(prompt), "4")


def test_a_damaged_model_fails_with_a_sentence_and_works_once_it_is_mended(comfy: Comfy) -> None:
    folder = comfy.base / "models/llada2/damaged"
    folder.mkdir()
    for part in BUILT_IN.iterdir():
        if part.name != "model.safetensors":
            (folder / part.name).symlink_to(part)
    prompt = workflow("text_to_image", **{"1": {"model": "damaged"}})
    weights, file = load_file(BUILT_IN / "model.safetensors"), folder / "model.safetensors"

    file.write_bytes((BUILT_IN / "model.safetensors").read_bytes()[:9000])
    assert "truncated or damaged" in comfy.refused(prompt)
    norm = "model.layers.2.input_layernorm.weight"
    save_file(weights | {norm: weights[norm] * float("nan")}, file)
    assert f"not finite (NaN or infinity) in {norm}" in failed(comfy.run(prompt), "2")
    save_file(weights, file)
    ran(comfy.run(prompt))


# --- memory ---------------------------------------------------------------------------------------------------------


def test_free_lets_everything_go_and_the_next_run_loads_it_again(comfy: Comfy, unique: str) -> None:
    draw = lambda seed: workflow("text_to_image", **{"2": {"prompt": unique, "seed": seed}, "3": {"seed": seed}})
    ran(comfy.run(draw(1)))
    comfy.free(3)  # backbone, decoder, VAE
    ran(comfy.run(draw(2)))  # its handle is still in ComfyUI's cache, its weights are not
    comfy.free(3, free_memory=True)
    ran(comfy.run(draw(1)))


def test_a_new_decoder_seed_loads_nothing(comfy: Comfy, unique: str) -> None:
    draw = lambda seed: workflow("text_to_image", **{"2": {"prompt": unique}, "3": {"seed": seed}})
    ran(comfy.run(draw(1)))
    before = comfy.log().count("let go"), comfy.log().count("loaded in")
    ran(comfy.run(draw(2)))
    assert (comfy.log().count("let go"), comfy.log().count("loaded in")) == before


# --- start-up -------------------------------------------------------------------------------------------------------


def test_the_pack_is_imported_fast(comfy: Comfy) -> None:
    (line,) = [line for line in comfy.log().splitlines() if "seconds:" in line and "ComfyUI-LLaDA2-MLX" in line]
    assert "IMPORT FAILED" not in line
    assert float(line.split(" seconds:")[0].split()[-1]) < 1


def test_the_workflows_are_templates_with_thumbnails(comfy: Comfy) -> None:
    import urllib.parse
    import urllib.request

    assert sorted(comfy.get("/workflow_templates")[PACK]) == list(TEMPLATES)
    for title in TEMPLATES:
        path = urllib.parse.quote(f"/api/workflow_templates/{PACK}/{title}.jpg")
        with urllib.request.urlopen(f"http://{comfy.address}{path}") as answer:
            assert answer.headers["Content-Type"] == "image/jpeg"


def test_the_users_tree_stays_as_it_is(comfyui: tuple[Path, Path]) -> None:
    assert not list((comfyui[0] / "custom_nodes").glob("*LLaDA2*"))
