"""The nodes that take codes as things, inside a real ComfyUI."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from client import Comfy, Run, failed, ran, workflow
from layouts import DRAWN, layout_of
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch

from llada2_mlx.checkpoint.codebook import VECTORS, origin
from llada2_mlx.checkpoint.layout import BUILT_IN, Checkpoint
from llada2_mlx.imaging.look import look, palette
from llada2_mlx.shapes.world import Colour, Kind, Place
from llada2_mlx.vq import Origin, VQGrid

NODES = [f"LLaDA2{name}VQ" for name in ("Save", "Load", "LookAt", "Crop", "Paste", "Flip", "Stitch", "Compare")]
ROOT = Path(__file__).parent.parent.parent
SHAPES = Checkpoint(BUILT_IN)
COLOURS = palette(SHAPES)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """What this test's files are called."""
    return f"grid-{crc32(request.node.nodeid.encode()):08x}"


def made(seed: int, height: int = 8, width: int = 8, of: Origin | None = None, size: int = 2048) -> VQGrid:
    codes = np.random.default_rng(seed).integers(0, size, (height, width))
    return VQGrid(codes, size, origin(SHAPES) if of is None else of)


def put(comfy: Comfy, name: str, grid: VQGrid) -> str:
    """Put a grid into the input folder, as the command line writes one; returns what Load VQ calls it."""
    grid.save(comfy.base / "input" / f"{name}.safetensors")
    return f"{name}.safetensors"


def load(file: str) -> dict:
    return {"class_type": "LLaDA2LoadVQ", "inputs": {"file": file}}


def node(kind: str, **inputs) -> dict:
    return {"class_type": f"LLaDA2{kind}VQ", "inputs": inputs}


def save(link: list, prefix: str) -> dict:
    return node("Save", vq=link, filename_prefix=prefix)


def saved(comfy: Comfy, run: Run, key: str) -> list[VQGrid]:
    """The grids that a Save VQ wrote."""
    files = run.outputs[key]["vq"]
    assert {each["type"] for each in files} == {"output"}
    return [VQGrid.load(comfy.base / "output" / each["subfolder"] / each["filename"]) for each in files]


def through(comfy: Comfy, name: str, kind: str, grids: dict[str, VQGrid], **inputs) -> VQGrid:
    """What one node makes of grids in files."""
    prompt = {key: load(put(comfy, f"{name}-{key}", grid)) for key, grid in grids.items()}
    prompt["9"] = node(kind, **{key: [key, 0] for key in grids}, **inputs)
    prompt["10"] = save(["9", 0], f"llada2/{name}")
    (result,) = saved(comfy, ran(comfy.run(prompt)), "10")
    return result


def refused_by(comfy: Comfy, name: str, kind: str, grids: dict[str, VQGrid], **inputs) -> str:
    prompt = {key: load(put(comfy, f"{name}-{key}", grid)) for key, grid in grids.items()}
    prompt["9"] = node(kind, **{key: [key, 0] for key in grids}, **inputs)
    prompt["10"] = {"class_type": "PreviewAny", "inputs": {"source": ["9", 0]}}
    return failed(comfy.run(prompt), "9")


def listed(comfy: Comfy) -> list[str]:
    return comfy.get("/object_info/LLaDA2LoadVQ")["LLaDA2LoadVQ"]["input"]["required"]["file"][1]["options"]


@pytest.mark.parametrize("kind", NODES)
def test_a_node_is_there_and_explains_itself(comfy: Comfy, kind: str) -> None:
    info = comfy.get(f"/object_info/{kind}")[kind]
    assert info["category"] == "LLaDA2/codes" and info["description"] and info["search_aliases"]
    assert info["display_name"] and all(info["output_tooltips"])
    inputs = {**info["input"]["required"], **info["input"].get("optional", {})}
    assert inputs and all(options.get("tooltip") for _, options in inputs.values())


def test_the_shipped_workflow_puts_the_star_into_a_second_corner(comfy: Comfy) -> None:
    run = ran(comfy.run(workflow("codes_as_things")))
    pictures = {path.parent.name: path for path in comfy.images(run) if path.parent.parent.name == "output"}
    assert layout_of(pictures["llada2"]) == {*DRAWN, (Kind.STAR, Colour.BLUE, Place.TOP_RIGHT)}
    looks = [run.outputs[key]["images"] for key in ("4", "8")]
    assert [len(each) for each in looks] == [1, 1]
    assert any("16 of 64 codes differ." in text for key, text in run.texts if key == "7")
    # what it saved is what it pasted into
    (grid,) = saved(comfy, run, "3")
    first = np.asarray(Image.open(comfy.base / "temp" / looks[0][0]["filename"]).convert("RGB"))
    assert (first == look(grid.codes, COLOURS, scale=32)).all()


def test_the_shipped_workflow_puts_a_half_and_its_mirror_image_side_by_side(comfy: Comfy) -> None:
    run = ran(comfy.run(workflow("flip_and_stitch")))
    drawn, flipped, stitched = (
        np.asarray(Image.open(comfy.image(run, key)).convert("RGB"))[16::32, 16::32] for key in ("4", "6", "8")
    )
    half = drawn[:, :4]  # a colour for each code
    assert (flipped == half[:, ::-1]).all() and (stitched == np.concatenate([half, half[:, ::-1]], 1)).all()
    assert layout_of(comfy.image(run, "10")) == {
        (Kind.CIRCLE, Colour.RED, Place.TOP_LEFT),
        (Kind.CIRCLE, Colour.RED, Place.TOP_RIGHT),
        (Kind.SQUARE, Colour.GREEN, Place.BOTTOM_LEFT),
        (Kind.SQUARE, Colour.GREEN, Place.BOTTOM_RIGHT),
    }


# --- saving and loading ---------------------------------------------------------------------------------------------


def test_what_is_saved_is_listed_and_loaded_with_its_origin(comfy: Comfy, name: str) -> None:
    drawn = workflow("text_to_image")
    prompt = {key: drawn[key] for key in ("1", "2")}
    prompt["3"] = save(["2", 0], f"llada2/{name}")
    before = listed(comfy)
    run = ran(comfy.run(prompt))
    file = f"llada2/{name}_00001_.safetensors"
    assert any(f"Saved {file}." in text for key, text in run.texts if key == "3")
    assert f"{file} [output]" not in before and f"{file} [output]" in listed(comfy)
    (grid,) = saved(comfy, run, "3")
    assert grid.origin.model == "Shapes (built in)" and grid.origin.vectors == origin(SHAPES).vectors

    again = {"1": load(f"{file} [output]"), "2": save(["1", 0], f"llada2/{name}-again"), "3": decode(["1", 0])}
    again["4"] = {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": f"llada2/{name}"}}
    run = ran(comfy.run(again))
    (copy,) = saved(comfy, run, "2")
    assert copy == grid and copy.origin == grid.origin
    # a picture of loaded codes is the picture of the drawn ones
    (direct,) = comfy.images(ran(comfy.run(drawn)))
    (loaded,) = comfy.images(run)
    assert Image.open(loaded).tobytes() == Image.open(direct).tobytes()


def decode(link: list, **changes) -> dict:
    inputs = workflow("text_to_image")["3"]["inputs"] | {"vq": link, "model": "the codes' own"} | changes
    return {"class_type": "ZImageDecode", "inputs": inputs}


def test_numbers_go_on_and_each_picture_of_a_batch_has_a_file(comfy: Comfy, name: str) -> None:
    prompt = {key: workflow("ask_about_a_picture")[key] for key in ("1", "2", "3", "4")}
    prompt["7"] = {"class_type": "RepeatImageBatch", "inputs": {"image": ["3", 0], "amount": 2}}
    prompt["4"]["inputs"]["image"] = ["7", 0]
    prompt["8"] = save(["4", 0], name)
    prompt["9"] = save(["8", 0], f"{name}-handed-on")
    run = ran(comfy.run(prompt))
    files = [each["filename"] for each in run.outputs["8"]["vq"]]
    assert files == [f"{name}_00001_.safetensors", f"{name}_00002_.safetensors"]
    assert saved(comfy, run, "9") == saved(comfy, run, "8")
    prompt["7"]["inputs"]["amount"] = 1
    run = ran(comfy.run(prompt))
    assert [each["filename"] for each in run.outputs["8"]["vq"]] == [f"{name}_00003_.safetensors"]


def test_the_workflow_travels_with_the_file(comfy: Comfy, name: str) -> None:
    prompt = {"1": load(put(comfy, name, made(1))), "2": save(["1", 0], f"%width%x%height%/{name}")}
    run = ran(comfy.run(prompt))
    (each,) = run.outputs["2"]["vq"]
    assert each["subfolder"] == "256x256"
    with safe_open(comfy.base / "output" / each["subfolder"] / each["filename"], "numpy") as file:
        kept = json.loads(file.metadata()["prompt"])
    assert {key: {**each, "is_changed": None} for key, each in kept.items()} == {
        key: {**each, "is_changed": None} for key, each in prompt.items()
    }


@pytest.mark.parametrize(
    "prefix",
    ["../x", "a/../../x", "/tmp/x", "a/../b", "~/../x/", "a//b", "", ".hidden", "a/.b/c", "a\\b", "c:x", "a\0b"],
)
def test_a_name_that_leads_out_is_refused_and_nothing_written(comfy: Comfy, name: str, prefix: str) -> None:
    before = sorted(comfy.base.rglob("*.safetensors"))
    put(comfy, name, made(1))
    said = comfy.refused({"1": load(f"{name}.safetensors"), "2": save(["1", 0], prefix)})
    assert "is no name for a file inside ComfyUI's output folder" in said
    assert sorted(comfy.base.rglob("*.safetensors")) == sorted([*before, comfy.base / f"input/{name}.safetensors"])


def test_a_linked_name_is_checked_too(comfy: Comfy, name: str) -> None:
    prompt = {"1": load(put(comfy, name, made(1))), "2": save(["1", 0], "")}
    prompt["3"] = {"class_type": "PrimitiveString", "inputs": {"value": "../x"}}
    prompt["2"]["inputs"]["filename_prefix"] = ["3", 0]
    assert "'../x' is no name for a file inside" in failed(comfy.run(prompt), "2")
    (comfy.base / "output").joinpath("out").symlink_to(comfy.base / "models")
    prompt["3"]["inputs"]["value"] = "out/x"
    assert "'out/x' is no name for a file inside" in failed(comfy.run(prompt), "2")
    prompt["3"]["inputs"]["value"] = "x" * 300
    assert "cannot be saved as" in failed(comfy.run(prompt), "2")


@pytest.mark.parametrize(
    "file",
    [
        "../models/llada2/golden/x.safetensors",
        "../output/x.safetensors",
        "../../x.safetensors [output]",
        "/etc/passwd",
        "/etc/passwd [output]",
        "a/../../x.safetensors",
        "..\\x.safetensors",
        "secret/x.safetensors",
        "x.safetensors [temp]",
        "a\0b.safetensors",
        ".hidden.safetensors",
    ],
)
def test_a_file_elsewhere_is_not_loaded(comfy: Comfy, file: str) -> None:
    outside = comfy.base / "outside"
    outside.mkdir(exist_ok=True)
    for place in (outside, comfy.base, comfy.base / "output", comfy.base / "temp"):
        place.mkdir(exist_ok=True)
        made(1).save(place / "x.safetensors")
    made(1).save(comfy.base / "input/.hidden.safetensors")
    if not (link := comfy.base / "input/secret").is_symlink():
        link.symlink_to(outside)
    said = comfy.refused({"1": load(file), "2": save(["1", 0], "x")})
    if file == "x.safetensors [temp]":
        assert "There is no saved grid" in said
    else:
        assert "is not inside ComfyUI's input or output folder" in said
    assert not [each for each in listed(comfy) if "secret" in each or "hidden" in each]


def test_a_linked_file_name_is_checked_too(comfy: Comfy) -> None:
    prompt = {"1": load(""), "2": save(["1", 0], "x")}
    assert "No saved grid is chosen" in comfy.refused(prompt)
    prompt["3"] = {"class_type": "PrimitiveString", "inputs": {"value": "../x.safetensors"}}
    prompt["4"] = {
        "class_type": "ComfySwitchNode",
        "inputs": {"switch": False, "on_false": ["3", 0], "on_true": ["3", 0]},
    }
    prompt["1"]["inputs"]["file"] = ["4", 0]  # a link of any type
    assert "is not inside" in failed(comfy.run(prompt), "1")


def test_a_damaged_file_is_listed_and_refused_when_queueing(comfy: Comfy, name: str) -> None:
    file = put(comfy, name, made(1))
    path = comfy.base / "input" / file
    whole = path.read_bytes()
    prompt = {"1": load(file), "2": save(["1", 0], f"llada2/{name}")}
    for content in (whole[:-20], whole[:40], b"", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]"):
        path.write_bytes(content)
        assert f"{file} is not a grid of codes" in comfy.refused(prompt)
    assert file in listed(comfy)
    save_file(
        {"codes": made(1).codes}, path, {"format": "llada2-vq", "height": "9", "width": "8", "codebook_size": "2048"}
    )
    assert "states 9 x 8 codes and holds 8 x 8" in comfy.refused(prompt)
    path.write_bytes(whole)
    assert saved(comfy, ran(comfy.run(prompt)), "2") == [made(1)]


def test_only_grids_are_offered(comfy: Comfy, name: str) -> None:
    folder = comfy.base / "input" / name
    (folder / "deep").mkdir(parents=True)
    made(1).save(folder / "deep/grid.safetensors")
    save_file({"lora": np.zeros(4, np.float32)}, folder / "lora.safetensors", {"format": "pt"})
    save_file({"plain": np.zeros(4, np.float32)}, folder / "plain.safetensors")
    (folder / "note.txt").write_text("grid")
    (folder / "._grid.safetensors").write_bytes(b"x")
    (folder / "folder.safetensors").mkdir()
    (folder / "gone.safetensors").symlink_to(folder / "nothing")
    os.mkfifo(folder / "pipe.safetensors")
    assert [each for each in listed(comfy) if each.startswith(name)] == [f"{name}/deep/grid.safetensors"]
    for file, sentence in (
        ("lora.safetensors", "is not a grid of codes"),
        ("note.txt", "is no saved grid: their names end in .safetensors"),
        ("folder.safetensors", "There is no saved grid"),
        ("pipe.safetensors", "There is no saved grid"),
        ("gone.safetensors", "There is no saved grid"),
    ):
        assert sentence in comfy.refused({"1": load(f"{name}/{file}"), "2": save(["1", 0], "x")})


def test_a_replaced_file_is_read_again(comfy: Comfy, name: str) -> None:
    file = put(comfy, name, made(1))
    prompt = {"1": load(file), "2": save(["1", 0], f"llada2/{name}")}
    assert saved(comfy, ran(comfy.run(prompt)), "2") == [made(1)]
    assert "1" in ran(comfy.run(prompt)).cached
    put(comfy, name, made(2))
    assert saved(comfy, ran(comfy.run(prompt)), "2") == [made(2)]


def test_a_grid_from_the_command_line_finds_its_model_here(comfy: Comfy, name: str) -> None:
    assert made(1).origin.model == "shapes"  # the folder; the lists call it otherwise
    file = put(comfy, name, made(1))
    prompt = {"1": load(file), "2": save(["1", 0], f"llada2/{name}"), "3": decode(["1", 0])}
    prompt["4"] = {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}}
    (grid,) = saved(comfy, ran(comfy.run(prompt)), "2")
    assert grid.origin.model == "Shapes (built in)"


def test_a_grid_of_a_model_that_is_not_here_is_told_of(comfy: Comfy, name: str) -> None:
    file = put(comfy, name, made(1, of=Origin("elsewhere", "v" * 32, "t" * 32)))
    prompt = {"1": load(file), "2": save(["1", 0], f"llada2/{name}")}
    run = ran(comfy.run(prompt))
    assert any("of the model elsewhere, and no model here" in text for key, text in run.texts if key == "1")
    prompt["3"] = decode(["1", 0])
    prompt["4"] = {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}}
    assert "There is no model 'elsewhere'" in failed(comfy.run(prompt), "3")
    prompt["3"] = decode(["1", 0], model="Shapes (built in)")
    assert "of the model elsewhere, and shapes has another codebook" in failed(comfy.run(prompt), "3")


def test_a_model_that_comes_later_is_found(comfy: Comfy, name: str) -> None:
    golden = ROOT / "tests/golden/checkpoint"
    folder = comfy.base / "models/llada2" / name
    (folder / "image_tokenizer").mkdir(parents=True)
    (source,) = (golden / "image_tokenizer").glob("*.safetensors")
    vectors = load_file(source)
    save_torch(vectors | {VECTORS: -vectors[VECTORS]}, folder / "image_tokenizer" / source.name)
    theirs, away = origin(Checkpoint(folder)), comfy.base / name
    folder.rename(away)
    prompt = {"1": load(put(comfy, name, made(1, of=theirs))), "2": node("Flip", vq=["1", 0], direction="both")}
    prompt["3"] = save(["2", 0], f"llada2/{name}")
    (grid,) = saved(comfy, ran(comfy.run(prompt)), "3")
    assert grid.origin.model == name
    came = away.rename(comfy.base / "models/llada2" / f"{name}-renamed")
    try:
        (grid,) = saved(comfy, ran(comfy.run(prompt)), "3")
        assert grid.origin.model == came.name
    finally:
        shutil.rmtree(came)  # other tests look at the list of models


def test_a_saved_grid_of_another_codebook_is_refused_before_anything_is_drawn(comfy: Comfy, name: str) -> None:
    golden = Checkpoint(ROOT / "tests/golden/checkpoint")
    theirs = made(1, of=origin(golden, "golden"), size=golden.config.codebook_size)
    file = put(comfy, name, theirs)
    prompt = workflow("text_to_image", **{"2": {"prompt": f"A red circle. ({crc32(name.encode())})"}})
    prompt["7"] = load(file)
    prompt["8"] = node("Paste", vq=["2", 0], piece=["7", 0], left=0, top=0)
    prompt["3"]["inputs"]["vq"] = ["8", 0]
    run = comfy.run(prompt)
    assert "has another codebook. Use one model for all nodes of a graph." in failed(run, "8")
    assert "2" not in run.executed
    # and of a node that reads: before its weights
    ask = workflow("ask_about_a_picture")
    ask = {key: ask[key] for key in ("1", "5", "6")} | {"7": load(file)}
    ask["5"]["inputs"]["vq"] = ["7", 0]
    run = comfy.run(ask)
    assert "of the model golden, and shapes has another codebook" in failed(run, "5") and "7" not in run.executed


# --- looking --------------------------------------------------------------------------------------------------------


def test_a_look_is_the_codes_in_the_palettes_colours(comfy: Comfy, name: str) -> None:
    grid = made(1, 8, 10)
    prompt = {"1": load(put(comfy, name, grid)), "2": node("LookAt", vq=["1", 0], model="the codes' own", pixels=16)}
    (shown,) = comfy.images(ran(comfy.run(prompt)))  # on the node itself
    assert (np.asarray(Image.open(shown).convert("RGB")) == look(grid.codes, COLOURS, scale=16)).all()
    # the mask is scaled to the grid, and marks
    prompt["3"] = {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 50, "height": 40}}
    prompt["4"] = {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 15, "height": 10}}
    prompt["5"] = {
        "class_type": "MaskComposite",
        "inputs": {"destination": ["3", 0], "source": ["4", 0], "x": 10, "y": 5, "operation": "add"},
    }
    prompt["2"]["inputs"] |= {"mask": ["5", 0], "pixels": 4}
    (shown,) = comfy.images(ran(comfy.run(prompt)))
    masked = np.zeros((8, 10), bool)
    masked[1:3, 2:5] = True  # 5 pixels of the mask a code
    assert (np.asarray(Image.open(shown).convert("RGB")) == look(grid.codes, COLOURS, masked, 4)).all()


def test_looking_at_codes_of_another_model(comfy: Comfy, name: str) -> None:
    file = put(comfy, name, made(1))
    prompt = {"1": load(file), "2": node("LookAt", vq=["1", 0], model="golden", pixels=8)}
    run = comfy.run(prompt)
    assert "and golden has another codebook" in failed(run, "2") and "1" not in run.executed
    prompt["2"]["inputs"]["model"] = "empty"
    assert "has no complete image tokenizer" in comfy.refused(prompt)
    unknown = put(comfy, f"{name}-unknown", made(1, of=Origin()))
    prompt = {"1": load(unknown), "2": node("LookAt", vq=["1", 0], model="the codes' own", pixels=8)}
    assert "do not say which model they are of" in failed(comfy.run(prompt), "2")
    prompt["2"]["inputs"]["model"] = "Shapes (built in)"
    ran(comfy.run(prompt))
    prompt["1"] = load(put(comfy, f"{name}-few", VQGrid(made(1).codes % 5, 5)))
    assert "made by a model with 5 codes; the image tokenizer" in failed(comfy.run(prompt), "2")
    small = put(comfy, f"{name}-large", made(1, of=Origin(), size=5000))
    prompt["1"] = load(small)
    assert "made by a model with 5000 codes; the image tokenizer" in failed(comfy.run(prompt), "2")


# --- cutting and putting together -----------------------------------------------------------------------------------


def test_crop(comfy: Comfy, name: str) -> None:
    grid = made(1, 10, 12)
    part = through(comfy, name, "Crop", {"vq": grid}, left=2, top=1, width=8, height=0)
    assert (part.codes == grid.codes[1:, 2:10]).all()


def test_crop_outside(comfy: Comfy, name: str) -> None:
    place = {"left": 0, "top": 0, "width": 0, "height": 0}
    grids = {"vq": made(1, 8, 10)}
    assert "Left has to be 0 to 9" in refused_by(comfy, name, "Crop", grids, **place | {"left": 10})
    assert "1 to 10 wide and 1 to 3 high" in refused_by(comfy, name, "Crop", grids, **place | {"top": 5, "height": 4})
    prompt = {"1": load(f"{name}-vq.safetensors"), "2": node("Crop", vq=["1", 0], **place | {"left": -1})}
    assert "smaller than min" in comfy.refused(prompt | {"3": save(["2", 0], "x")})


def test_a_size_without_a_token_is_told_of_and_refused_where_a_backbone_is_linked(comfy: Comfy, name: str) -> None:
    prompt = {"1": load(put(comfy, name, made(1, 10, 12)))}
    prompt["2"] = node("Crop", vq=["1", 0], left=0, top=0, width=5, height=8)
    prompt["3"] = save(["2", 0], f"llada2/{name}")
    told = lambda run: [text for key, text in run.texts if key == "2" and text.strip()]
    (text,) = told(ran(comfy.run(prompt)))
    assert "8 x 5 codes (height x width) can be decoded, pasted and joined, but not read or edited" in text
    assert "shapes has no tokens for this size" in text
    prompt["2"]["inputs"]["width"] = 10
    assert not told(ran(comfy.run(prompt)))
    prompt["4"] = workflow("text_to_image")["1"]
    prompt["2"]["inputs"] |= {"backbone": ["4", 0], "width": 5}
    run = comfy.run(prompt)
    assert "A grid of 8 x 5 codes" in failed(run, "2") and "1" not in run.executed
    prompt["2"]["inputs"] |= {"width": 0, "left": 7}  # only known with the grid
    assert "A grid of 8 x 5 codes" in failed(comfy.run(prompt), "2")
    prompt["2"]["inputs"] |= {"width": 0, "left": 4}
    assert saved(comfy, ran(comfy.run(prompt)), "3")[0].width == 8
    # of other codes than the backbone's
    prompt["4"]["inputs"]["model"] = "golden"
    run = comfy.run(prompt)
    assert "has another codebook" in failed(run, "2") and "1" not in run.executed


def test_paste(comfy: Comfy, name: str) -> None:
    grid, piece = made(1, 8, 10), made(2, 3, 4)
    pasted = through(comfy, name, "Paste", {"vq": grid, "piece": piece}, left=6, top=5)
    expected = grid.codes.copy()
    expected[5:, 6:] = piece.codes
    assert (pasted.codes == expected).all() and pasted.origin.model == "Shapes (built in)"


def test_paste_only_where_two_grids_differ(comfy: Comfy, name: str) -> None:
    """The mask of Compare VQ, over a piece as large as the grid, brings the changes over and nothing else."""
    before, after = made(1, 8, 10), made(1, 8, 10)
    codes = before.codes.copy()
    codes[2:4, 3:7] = (codes[2:4, 3:7] + 1) % 2048
    after = VQGrid(codes, 2048, before.origin)
    other = made(3, 8, 10)
    prompt = {str(key): load(put(comfy, f"{name}-{key}", grid)) for key, grid in enumerate((before, after, other), 1)}
    prompt["4"] = node("Compare", first=["1", 0], second=["2", 0])
    prompt["5"] = node("Paste", vq=["3", 0], piece=["2", 0], left=0, top=0, mask=["4", 0])
    prompt["6"] = save(["5", 0], f"llada2/{name}")
    prompt["7"] = {"class_type": "PreviewAny", "inputs": {"source": ["4", 1]}}
    prompt["8"] = {"class_type": "MaskToImage", "inputs": {"mask": ["4", 0]}}
    prompt["9"] = {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": f"llada2/{name}"}}
    run = ran(comfy.run(prompt))
    expected = other.codes.copy()
    expected[2:4, 3:7] = codes[2:4, 3:7]
    assert (saved(comfy, run, "6")[0].codes == expected).all()
    assert run.outputs["7"]["text"] == ["8"]
    assert any("8 of 80 codes differ." in text for key, text in run.texts if key == "4")
    (path,) = comfy.images(run)
    mask = np.asarray(Image.open(path).convert("L"))
    assert mask.shape == (256, 320)  # 32 pixels a code, as the decoded picture
    assert (mask[64:128, 96:224] == 255).all() and (mask > 0).sum() == 8 * 32 * 32


def test_what_does_not_fit_together(comfy: Comfy, name: str) -> None:
    small, large, place = made(1, 8, 8), made(2, 9, 10), {"left": 0, "top": 0}
    assert "The piece is 10 wide and 9 high" in refused_by(comfy, name, "Paste", {"vq": small, "piece": large}, **place)
    assert "There it can be 1 to 1 wide" in refused_by(
        comfy, name, "Paste", {"vq": small, "piece": made(3, 2, 2)}, left=7, top=0
    )
    assert "Grids of one size can be compared" in refused_by(comfy, name, "Compare", {"first": small, "second": large})
    for layout in ("side by side", "one below the other"):
        said = refused_by(comfy, name, "Stitch", {"first": small, "second": large}, layout=layout)
        assert f"Grids that stand {layout} need one" in said


def test_two_codebooks_are_refused_where_the_graph_does_not_know_them(comfy: Comfy, name: str) -> None:
    theirs = made(2, of=Origin("elsewhere", "v" * 32, "t" * 32))
    said = refused_by(comfy, name, "Compare", {"first": made(1), "second": theirs})
    assert "The grids are of two codebooks, of Shapes (built in)" in said and "of elsewhere" in said


def test_flip(comfy: Comfy, name: str) -> None:
    grid = made(1, 8, 10)
    for direction, expected in {
        "left and right": grid.codes[:, ::-1],
        "top and bottom": grid.codes[::-1],
        "both": grid.codes[::-1, ::-1],
    }.items():
        assert (through(comfy, name, "Flip", {"vq": grid}, direction=direction).codes == expected).all()
    prompt = {"1": load(f"{name}-vq.safetensors"), "2": node("Flip", vq=["1", 0], direction="round")}
    assert "not in" in comfy.refused(prompt | {"3": save(["2", 0], "x")})


def test_stitch(comfy: Comfy, name: str) -> None:
    first, second = made(1), made(2)
    row = through(comfy, name, "Stitch", {"first": first, "second": second}, layout="side by side")
    assert (row.codes == np.hstack([first.codes, second.codes])).all()
    column = through(comfy, name, "Stitch", {"first": first, "second": second}, layout="one below the other")
    assert (column.codes == np.vstack([first.codes, second.codes])).all()


def test_a_stitched_size_is_checked(comfy: Comfy, name: str) -> None:
    files = [put(comfy, f"{name}-{width}", made(width, 8, width)) for width in (8, 3)]
    prompt = {"1": load(files[0]), "2": load(files[1]), "4": workflow("text_to_image")["1"]}
    prompt["3"] = node("Stitch", first=["1", 0], second=["2", 0], layout="side by side", backbone=["4", 0])
    prompt["5"] = save(["3", 0], f"llada2/{name}")
    assert "A grid of 8 x 11 codes (height x width) has no size tokens" in failed(comfy.run(prompt), "3")
    prompt["3"]["inputs"]["second"] = ["1", 0]
    assert saved(comfy, ran(comfy.run(prompt)), "5")[0].width == 16


def test_a_single_grid_goes_with_each_of_a_batch(comfy: Comfy, name: str) -> None:
    prompt = {key: workflow("ask_about_a_picture")[key] for key in ("1", "2", "3", "4")}
    prompt["7"] = {"class_type": "RepeatImageBatch", "inputs": {"image": ["3", 0], "amount": 2}}
    prompt["4"]["inputs"]["image"] = ["7", 0]
    piece = made(2, 2, 2)
    prompt["8"] = load(put(comfy, name, piece))
    prompt["9"] = node("Paste", vq=["4", 0], piece=["8", 0], left=1, top=1)
    prompt["10"] = save(["9", 0], f"llada2/{name}")
    prompt["11"] = node("LookAt", vq=["9", 0], model="the codes' own", pixels=2)
    prompt["12"] = node("Compare", first=["4", 0], second=["9", 0])
    prompt["13"] = {"class_type": "MaskPreview", "inputs": {"mask": ["12", 0]}}
    run = ran(comfy.run(prompt))
    grids = saved(comfy, run, "10")
    assert len(grids) == 2 and all((grid.codes[1:3, 1:3] == piece.codes).all() for grid in grids)
    assert len(run.outputs["11"]["images"]) == 2 and len(run.outputs["13"]["images"]) == 2
