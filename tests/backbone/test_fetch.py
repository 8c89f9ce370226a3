"""A copy with few bits that is made while its model arrives, against one that is made of the whole model."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
import torch
from hub_server import Hub, environment, serving, talk_to
from safetensors.torch import load_file, save_file
from synthetic import BACKBONE, Sizes, names_of, split, tiny, write_backbone, write_strewn

from llada2_mlx import cli, tasks
from llada2_mlx.backbone import fetch
from llada2_mlx.backbone.convert import convert, is_current, made_by
from llada2_mlx.backbone.fetch import fetch_copy, needs_fetching
from llada2_mlx.backbone.handle import Backbone
from llada2_mlx.backbone.weights import SCALE, SIDE
from llada2_mlx.checkpoint.copies import STATE
from llada2_mlx.checkpoint.layout import HUB_MODEL, INDEX, Checkpoint, Part, resolve
from llada2_mlx.errors import CheckpointError, LLaDA2Error, RequestError
from llada2_mlx.progress import Progress, ignore
from llada2_mlx.worker import MLXWorker


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with all its parts, in thirteen files as the published one."""
    return write_strewn(tmp_path_factory.mktemp("hub") / "model")


@pytest.fixture(scope="module")
def expected(published: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, bytes]]:
    """What converting the whole model makes, by the bits."""
    return {bits: whole(published, tmp_path_factory.mktemp("whole") / "copy", bits) for bits in (4, 8)}


def whole(source: Path, copy: Path, bits: int) -> dict[str, bytes]:
    return content(MLXWorker().drive(convert(Checkpoint(source), copy, bits)).root)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(published, HUB_MODEL) as served:
        talk_to(served, tmp_path / "home/hub", monkeypatch)
        yield served


def shards_of(hub: Hub) -> dict[str, int]:
    """The files with the backbone's weights, and their bytes."""
    return {path.name: path.stat().st_size for path in hub.folder.glob("model*.safetensors")}


def store(tmp_path: Path) -> Path:
    return tmp_path / "home/hub/models--inclusionAI--LLaDA2.0-Uni"


def lying(hub: Hub, tmp_path: Path) -> dict[str, int]:
    """The bytes of the model's own weights that lie on the disk, by file, whole or in part."""
    blobs = {hub.blobs()[name]: name for name in shards_of(hub)}
    found: dict[str, int] = {}
    for path in (store(tmp_path) / "blobs").glob("*"):
        try:
            if (name := blobs.get(path.name.removesuffix(".incomplete"))) and path.stat().st_size:
                found[name] = found.get(name, 0) + path.stat().st_size
        except FileNotFoundError:
            pass  # it went meanwhile
    return found


class Peak:
    """The most that lay on the disk, seen at each request to the hub and at each step of the work.

    ``whole`` has the files that were seen whole, with how often they had been asked for.
    """

    def __init__(self, hub: Hub, tmp_path: Path):
        self.hub, self.tmp_path, self.files, self.bytes, self.beside = hub, tmp_path, 0, 0, 0
        self.whole: dict[str, int] = {}
        hub.on_request = self.look

    def look(self, *_: object) -> None:
        found = lying(self.hub, self.tmp_path)
        for name in shards_of(self.hub):
            if name not in self.whole and (store(self.tmp_path) / "blobs" / self.hub.blobs()[name]).exists():
                self.whole[name] = len(self.hub.ranges(name))
        growing = 0
        for path in store(self.tmp_path).glob("snapshots/*/.mlx-*bit.partial/*"):
            try:
                growing += path.stat().st_size
            except FileNotFoundError:
                pass
        self.files, self.bytes = max(self.files, len(found)), max(self.bytes, sum(found.values()))
        self.beside = max(self.beside, growing)


@pytest.mark.parametrize("bits", [4, 8])
def test_it_is_the_copy_of_the_whole_model_byte_for_byte(hub: Hub, expected, tmp_path: Path, bits: int) -> None:
    hub.pause, peak, seen = 0.0005, Peak(hub, tmp_path), []

    def on_step(progress: Progress) -> None:
        peak.look()
        seen.append(progress)

    checkpoint = fetch_copy(HUB_MODEL, bits, on_step)
    assert content(checkpoint.copy_folder(bits)) == expected[bits]
    # nothing of the model's own weights is left, each file came once, and never more than three were there
    assert not lying(hub, tmp_path) and not list(checkpoint.root.glob("model*.safetensors"))
    assert all(hub.ranges(shard) == [0] for shard in shards_of(hub))
    largest = sorted(shards_of(hub).values())[-3:]
    assert 2 <= peak.files <= 3 and peak.bytes <= sum(largest)
    layers = [len(each) for name, each in expected[bits].items() if name.startswith("model-")]
    names = sum(len(each) for name, each in expected[bits].items() if not name.startswith("model-"))
    headers = 13 * 5 * 16_000  # pieces are many files
    assert peak.beside <= sum(layers) + names + max(layers) + headers
    # the bar goes up to all of the bytes
    bar = [(step.done, step.total) for step in seen if step.phase == "downloading" and step.total > 10**5]
    assert bar == sorted(bar) and bar[-1] == (sum(shards_of(hub).values()),) * 2
    assert {step.phase for step in seen} >= {"downloading", "converting"}
    assert not list(checkpoint.root.glob(".*"))  # no lock, no half a copy
    hub.requests.clear()
    assert fetch_copy(HUB_MODEL, bits) == checkpoint and not hub.requests


def test_what_is_there_of_an_unfinished_download_is_used_up_first(hub: Hub, expected, tmp_path: Path) -> None:
    shards = sorted(shards_of(hub))
    hub.broken = set(shards[5:])
    with pytest.raises(CheckpointError, match="503"):
        resolve(HUB_MODEL, Part.BACKBONE)
    there = lying(hub, tmp_path)
    assert there
    hub.broken.clear()
    hub.requests.clear()
    checkpoint = fetch_copy(HUB_MODEL, 4)
    assert content(checkpoint.copy_folder(4)) == expected[4]
    # nothing that was there is asked for again; a file that the error cut short is gone on with
    assert all(begin >= size for shard, size in there.items() for begin in hub.ranges(shard))
    assert not lying(hub, tmp_path)


def test_where_the_weights_are_they_stay(hub: Hub, expected, tmp_path: Path) -> None:
    resolve(HUB_MODEL, Part.BACKBONE)
    hub.requests.clear()
    checkpoint = fetch_copy(HUB_MODEL, 4)
    assert content(checkpoint.copy_folder(4)) == expected[4]
    assert lying(hub, tmp_path).keys() == shards_of(hub).keys() and not hub.requests


def test_a_content_that_another_revision_has_stays(hub: Hub, tmp_path: Path) -> None:
    resolve(HUB_MODEL, Part.BACKBONE)
    old = store(tmp_path) / "snapshots" / hub.commit
    hub.commit = "b" * 40
    shutil.copytree(old, old.with_name(hub.commit), symlinks=True)
    (store(tmp_path) / "refs/main").write_text(hub.commit)
    (old.with_name(hub.commit) / sorted(shards_of(hub))[0]).unlink()
    checkpoint = fetch_copy(HUB_MODEL, 4)
    assert checkpoint.root.name == hub.commit and checkpoint.is_copy_alone
    Checkpoint(old).require(Part.BACKBONE).backbone_tensors()
    assert not Checkpoint(old).is_copy_alone


# --- stopped ------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import huggingface_hub.file_download, huggingface_hub.hf_api
from huggingface_hub import constants
import mlx.core as mx
from llada2_mlx.backbone import convert, fetch
from llada2_mlx.checkpoint.hub import Arriving

constants.DOWNLOAD_CHUNK_SIZE = 4096

def die():
    os.kill(os.getpid(), signal.SIGKILL)

use, drop, save = fetch._Growing._use, Arriving.drop, mx.save_safetensors

def dying_use(self, name):
    if name == shard and where == "arrived":
        die()
    dying = name == shard
    if dying and where == "piece":
        def half(file, *args):
            file.write(b"half a file"); file.flush(); die()
        mx.save_safetensors = half
    yield from use(self, name)
    if dying and where == "converted":
        die()

def dying_drop(self, names, on_step):
    drop(self, names, on_step)
    if shard in names and where == "dropped":
        die()

fetch._Growing._use, Arriving.drop = dying_use, dying_drop

def on_step(progress):
    if where == "arriving" and progress.phase == "downloading":
        name = os.path.join(constants.HF_HUB_CACHE, "models--inclusionAI--LLaDA2.0-Uni/blobs", shard + ".incomplete")
        if os.path.exists(name) and os.path.getsize(name) > 0:
            die()

# a process for each line, so that what takes seconds to import is imported once
for line in sys.stdin:
    where, shard = line.split()
    if not (child := os.fork()):
        fetch.fetch_copy("inclusionAI/LLaDA2.0-Uni", 4, on_step)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


PLACES = ("arrived", "piece", "converted", "dropped")


def test_killed_at_each_file_it_goes_on(hub: Hub, expected, tmp_path: Path) -> None:
    shards, peak, places, turns = sorted(shards_of(hub)), Peak(hub, tmp_path), {}, cycle(PLACES)
    talk = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen([sys.executable, "-c", KILLED], env=environment(hub, tmp_path / "home"), **talk) as killing:
        for shard in shards:
            if shard in peak.whole and shard not in lying(hub, tmp_path):
                continue  # it was used up beside the one before
            places[shard] = where = next(turns) if shard in lying(hub, tmp_path) else "arriving"
            hub.slow = {shard} if where == "arriving" else set()
            killing.stdin.write(f"{where} {hub.blobs()[shard] if where == 'arriving' else shard}\n")
            assert killing.stdout.readline() == f"{-signal.SIGKILL}\n", (where, shard)
            peak.look()
        killing.stdin.close()
    hub.slow = set()
    checkpoint = fetch_copy(HUB_MODEL, 4)
    assert content(checkpoint.copy_folder(4)) == expected[4]
    assert peak.files <= 3 and not lying(hub, tmp_path)
    assert set(places.values()) == {"arriving", *PLACES}
    # nothing that was whole is asked for again, and what was not goes on where it ended
    assert len(peak.whole) > len(shards) // 2  # the last came after the last look
    assert all(len(hub.ranges(name)) == asked for name, asked in peak.whole.items())
    for shard, where in places.items():
        begun = hub.ranges(shard)
        assert begun == sorted(begun) and (where != "arriving" or begun[-1] > 0), (where, shard, begun)


class Cut(BaseException):
    """As when the power goes: what is to be written afterwards is not."""


def test_cut_off_at_any_change_of_the_disk_it_goes_on(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run gets a few changes of the disk further than the one before, until one comes to the end."""
    hub.folder = Path(shutil.copytree(tiny(), tmp_path / "in-four"))
    names = sorted(load_file(hub.folder / "model.safetensors"))
    split(hub.folder, {name: names_of(4)[index % 80 // 20] for index, name in enumerate(names)})
    expected = whole(Path(shutil.copytree(hub.folder, tmp_path / "source")), tmp_path / "expected", 4)
    real = {name: getattr(Path, name) for name in ("replace", "unlink", "rename")}
    left = 0

    def counted(name: str) -> Callable:
        def change(path: Path, *args, **options):
            nonlocal left
            if not str(path).startswith(str(store(tmp_path) / "snapshots")):
                return real[name](path, *args, **options)
            left -= 1
            if left < 0:
                raise Cut
            return real[name](path, *args, **options)

        return change

    for name in real:
        monkeypatch.setattr(Path, name, counted(name))
    runs, peak = 0, Peak(hub, tmp_path)
    while True:
        left, runs = 5 + runs // 2, runs + 1
        try:
            checkpoint = fetch_copy(HUB_MODEL, 4)
            break
        except Cut:
            peak.look()
        assert runs < 300
    assert runs > 10 and peak.files <= 3
    # nothing that was whole is asked for again
    assert peak.whole and all(len(hub.ranges(name)) == asked for name, asked in peak.whole.items())
    left = 10**9
    assert content(checkpoint.copy_folder(4)) == expected and not lying(hub, tmp_path)


def test_cancelled_at_each_step_it_goes_on(hub: Hub, expected, tmp_path: Path) -> None:
    class Cancelled(BaseException):
        pass

    runs, left = 0, 0

    def on_step(progress: Progress) -> None:
        nonlocal left
        left -= progress.phase == "converting"
        if left < 0:
            raise Cancelled

    while True:
        left, runs = 5 + runs, runs + 1
        try:
            checkpoint = fetch_copy(HUB_MODEL, 4, on_step)
            break
        except Cancelled:
            assert runs < 200
    assert runs > 5 and content(checkpoint.copy_folder(4)) == expected[4]
    assert all(hub.ranges(shard) == [0] for shard in shards_of(hub))


def test_a_piece_that_a_power_cut_has_emptied_is_made_again(hub: Hub, expected, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.phase == "downloading" and len(list(store(tmp_path).rglob("piece-*"))) > 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_copy(HUB_MODEL, 4, stop)
    sorted(store(tmp_path).rglob("piece-*"))[0].write_bytes(b"")
    assert content(fetch_copy(HUB_MODEL, 4).copy_folder(4)) == expected[4]


def test_two_at_once(hub: Hub, expected, tmp_path: Path) -> None:
    said = []

    def second(progress: Progress) -> None:
        if progress.phase == "converting" and not said:
            for bits in (4, 8):  # whichever: they would take each other's files away
                with pytest.raises(LLaDA2Error, match="is being downloaded by another program; wait") as error:
                    fetch_copy(HUB_MODEL, bits)
                said.append(str(error.value))

    assert content(fetch_copy(HUB_MODEL, 4, second).copy_folder(4)) == expected[4] and len(said) == 2


# --- other layouts ------------------------------------------------------------------------------------------------


def test_a_model_in_one_file(hub: Hub, tmp_path: Path) -> None:
    hub.folder = tiny()
    checkpoint = fetch_copy(HUB_MODEL, 4)
    assert content(checkpoint.copy_folder(4)) == whole(tiny(), tmp_path / "whole", 4)
    assert not lying(hub, tmp_path) and not (checkpoint.root / "model.safetensors").exists()
    assert Backbone(resolve(HUB_MODEL, Part.BACKBONE)).precision == "4bit"


def test_float8_whose_scales_are_in_another_file(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "eight"
    folder.mkdir()
    wide = replace(BACKBONE, hidden_size=320, intermediate_size=448, moe_intermediate_size=192, num_experts=8)
    write_backbone(folder, Sizes(wide), torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    for name, value in list(tensors.items()):
        if "proj" in name or "query_key_value" in name:
            rows, columns = (-(-side // SIDE) for side in value.shape)
            tensors[name] = (value.float() * 50).to(torch.float8_e4m3fn)
            tensors[name + SCALE] = torch.rand(rows, columns) / 100 + 0.005
    save_file(tensors, folder / "model.safetensors")
    shards = names_of(4)
    split(folder, {name: shards[index % 3 + name.endswith(SCALE)] for index, name in enumerate(sorted(tensors))})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    hub.folder = folder
    checkpoint = fetch_copy(HUB_MODEL, 4)
    assert content(checkpoint.copy_folder(4)) == whole(folder, tmp_path / "whole", 4)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_that_is_a_copy_itself(hub: Hub, tmp_path: Path, bits: int) -> None:
    hub.folder = MLXWorker().drive(convert(Checkpoint(hub.folder), tmp_path / "shared", 4)).root
    if bits == 8:
        with pytest.raises(RequestError, match="is quantised to 4 bits, and the lost precision cannot be restored"):
            fetch_copy(HUB_MODEL, bits)
        assert not any("/cdn/" in line for line in hub.requests)  # before its weights are fetched
    else:
        checkpoint = fetch_copy(HUB_MODEL, bits)
        assert not checkpoint.missing(Part.BACKBONE, published=True) and Backbone(checkpoint).precision == "4bit"


# --- what does not fit --------------------------------------------------------------------------------------------


def copied(hub: Hub, tmp_path: Path) -> Path:
    hub.folder = Path(shutil.copytree(hub.folder, tmp_path / "other"))
    return hub.folder


def test_an_index_that_does_not_fit_the_config_is_refused_before_any_weight(hub: Hub, tmp_path: Path) -> None:
    index = copied(hub, tmp_path) / INDEX
    named = json.loads(index.read_text())["weight_map"]
    named.pop("model.layers.1.mlp.experts.3.up_proj.weight")
    index.write_text(json.dumps({"weight_map": named}))
    with pytest.raises(CheckpointError, match="missing: model.layers.1.mlp.experts.3.up_proj.weight"):
        fetch_copy(HUB_MODEL, 4)
    assert not any("/cdn/" in line for line in hub.requests)


def test_an_index_of_files_that_the_hub_does_not_have(hub: Hub, tmp_path: Path) -> None:
    shard = sorted(shards_of(hub))[3]
    (copied(hub, tmp_path) / shard).unlink()
    with pytest.raises(CheckpointError, match=f"names {shard}, which the hub does not have"):
        fetch_copy(HUB_MODEL, 4)
    assert not any("/cdn/" in line for line in hub.requests)


@pytest.mark.parametrize(("value", "message"), [
    (lambda tensor: tensor[:1], r"lm_head.weight in .* is \[1, 64\] instead of"),
    (lambda tensor: tensor * float("nan"), "not finite .* in lm_head.weight"),
    (lambda tensor: tensor.to(torch.int32), "lm_head.weight in .* is stored as I32"),
])  # fmt: skip
def test_a_tensor_that_cannot_be_used_is_named(hub: Hub, tmp_path: Path, value: Callable, message: str) -> None:
    folder = copied(hub, tmp_path)
    path = folder / json.loads((folder / INDEX).read_text())["weight_map"]["lm_head.weight"]
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": value(tensors["lm_head.weight"])}, path)
    with pytest.raises(CheckpointError, match=message):
        fetch_copy(HUB_MODEL, 4)


def test_parts_that_the_hub_does_not_have_are_refused_first(hub: Hub, tmp_path: Path) -> None:
    shutil.rmtree(copied(hub, tmp_path) / "vae")
    with pytest.raises(CheckpointError, match="on the hub has no vae/config.json"):
        fetch_copy(HUB_MODEL, 4, later=[Part.VAE])
    assert not hub.fetched()


def test_what_is_no_copy_is_not_replaced(hub: Hub) -> None:
    mine = resolve(HUB_MODEL, Part.VAE).root / "mlx-4bit/mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(RequestError, match="holds something else"):
        fetch_copy(HUB_MODEL, 4)
    assert mine.read_text() == "mine" and not any("/cdn/model" in line for line in hub.requests)


def test_fewer_files_where_the_disk_is_small_and_none_where_it_is_too_small(
    hub: Hub, expected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage, free = shutil.disk_usage, [0]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=free[0]))
    with pytest.raises(CheckpointError, match="more in .* to spare, and .* are free on that disk. Make room"):
        free[0] = 10**9 + 100_000
        fetch_copy(HUB_MODEL, 4)
    assert not any("/cdn/model" in line for line in hub.requests)
    size = json.loads(expected[4][INDEX])["metadata"]["total_size"]
    free[0] = 10**9 + int(1.25 * size + 1.5 * max(shards_of(hub).values()))  # the copy, a layer of eight, and one file
    peak = Peak(hub, tmp_path)
    assert content(fetch_copy(HUB_MODEL, 4, peak.look).copy_folder(4)) == expected[4]
    assert peak.files == 1


# --- a model that is here as a copy alone -------------------------------------------------------------------------


@pytest.fixture
def alone(hub: Hub) -> Checkpoint:
    checkpoint = fetch_copy(HUB_MODEL, 4)
    hub.requests.clear()
    return checkpoint


def test_it_is_taken_for_the_backbone(hub: Hub, alone: Checkpoint, published: Path, tmp_path: Path) -> None:
    assert resolve(HUB_MODEL, Part.BACKBONE) == alone and not hub.requests
    assert not alone.missing(Part.BACKBONE) and alone.missing(Part.BACKBONE, published=True)
    assert not needs_fetching(HUB_MODEL, "4bit")
    auto, four = Backbone(alone), Backbone(alone, "4bit")
    assert auto.precision == four.precision == "4bit" and "Only smaller copies" in auto.reason and four.reason is None
    of_whole = Backbone(Checkpoint(Path(shutil.copytree(published, tmp_path / "whole"))), "4bit")
    assert auto.size == of_whole.size
    assert tasks.text_to_vq(auto, "a cat").grid == tasks.text_to_vq(of_whole, "a cat").grid


@pytest.mark.parametrize("precision", ["bf16", "float32", "8bit", "6bit"])
def test_another_precision_says_what_to_do(alone: Checkpoint, precision: str) -> None:
    with pytest.raises(RequestError) as error:
        Backbone(alone, precision)
    said = str(error.value)
    assert "only as a smaller copy, 4bit" in said and f"{precision} cannot be made of that. Choose 4bit or auto" in said
    assert f"llada2-mlx download {HUB_MODEL}" in said
    assert (f"--bits {precision[0]}" in said) == precision.endswith("bit")


def test_two_copies(hub: Hub, alone: Checkpoint, expected, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch_copy(HUB_MODEL, 8)
    assert [content(alone.copy_folder(bits)) for bits in (4, 8)] == [expected[4], expected[8]]
    assert Backbone(alone).precision == "8bit"  # the most exact that fits
    monkeypatch.setattr("llada2_mlx.backbone.handle.machine_bytes", lambda: 10**6)
    small = Backbone(alone)
    assert small.precision == "4bit" and "4bit, the smallest" in small.reason and "too large" in small.reason
    assert small.reason.endswith("Only smaller copies of the model are on this machine: 8bit and 4bit.")


def test_its_other_parts_come_without_the_weights(hub: Hub, alone: Checkpoint) -> None:
    assert resolve(HUB_MODEL, Part.BACKBONE, Part.VAE, verify=True) == alone
    assert hub.fetched() == {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"}


def test_a_text_that_is_lost_comes_again_without_the_weights(hub: Hub, alone: Checkpoint) -> None:
    (alone.root / "tokenizer.json").resolve().unlink()
    assert resolve(HUB_MODEL, Part.BACKBONE) == alone and hub.fetched() == {"tokenizer.json"}
    assert Backbone(alone).precision == "4bit"


def test_a_copy_that_is_damaged_is_none(hub: Hub, alone: Checkpoint, expected) -> None:
    shard = sorted(alone.copy_folder(4).glob("model-*"))[0]
    shard.write_bytes(shard.read_bytes()[:-10])
    assert alone.missing(Part.BACKBONE) and needs_fetching(HUB_MODEL, "4bit")
    assert content(fetch_copy(HUB_MODEL, 4).copy_folder(4)) == expected[4]


def test_a_copy_of_another_model_is_none(alone: Checkpoint) -> None:
    state = json.loads((alone.copy_folder(4) / STATE).read_text())
    state["source"]["config.json"][1] = "0" * 64
    (alone.copy_folder(4) / STATE).write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="are of another model or state of it. Download it again with"):
        Backbone(alone)


def test_the_whole_model_can_follow(hub: Hub, alone: Checkpoint, expected) -> None:
    assert resolve(HUB_MODEL, Part.BACKBONE, published=True) == alone
    assert not alone.missing(Part.BACKBONE, published=True) and not alone.is_copy_alone
    assert is_current(alone.copy_folder(4), alone, 4) and Backbone(alone, "float32").precision == "float32"


def test_half_of_the_whole_model_does_not_hide_the_copy(hub: Hub, alone: Checkpoint) -> None:
    hub.broken = set(sorted(shards_of(hub))[6:])
    with pytest.raises(CheckpointError, match="503"):
        resolve(HUB_MODEL, Part.BACKBONE, published=True)
    assert list(alone.root.glob("model-*")) and Backbone(resolve(HUB_MODEL, Part.BACKBONE)).precision == "4bit"


def test_a_copy_of_the_copy_stands_alone(alone: Checkpoint, expected, tmp_path: Path) -> None:
    assert cli.main(["convert", str(alone.root), str(tmp_path / "shared"), "--bits", "4"]) == 0
    made = content(tmp_path / "shared")
    assert {name: each for name, each in made.items() if name in expected[4] and name != STATE} == {
        name: each for name, each in expected[4].items() if name != STATE
    }
    layer = sorted(alone.copy_folder(4).glob("model-*"))[0]
    assert (tmp_path / "shared" / layer.name).stat().st_ino == layer.stat().st_ino  # a link: no bytes of its own
    about = (tmp_path / "shared/README.md").read_text()
    assert f"base_model: {HUB_MODEL}\n" in about and "Parts: backbone.\n" in about
    assert f"Made by {made_by()}:\n\n    llada2-mlx convert {HUB_MODEL} FOLDER --bits 4 --group-size 64\n" in about
    with pytest.raises(RequestError, match="only as a smaller copy, 4bit; another precision cannot be made of that"):
        MLXWorker().drive(convert(alone, tmp_path / "eight", 8), ignore)


# --- the command --------------------------------------------------------------------------------------------------


def command(hub: Hub, tmp_path: Path, *words: str) -> subprocess.CompletedProcess:
    options = {"env": environment(hub, tmp_path / "home"), "text": True, "capture_output": True}
    return subprocess.run([sys.executable, "-m", "llada2_mlx.cli", *words], **options)


def test_the_command(hub: Hub, expected, tmp_path: Path) -> None:
    done = command(hub, tmp_path, "download", "--bits", "4", "--parts", "backbone", "vae")
    assert done.returncode == 0 and not done.stderr, done.stderr
    root = Path(done.stdout.strip())
    assert content(root / "mlx-4bit") == expected[4] and not lying(hub, tmp_path)
    assert not Checkpoint(root).missing(Part.VAE) and Checkpoint(root).missing(Part.DECODER_TURBO)
    hub.requests.clear()
    done = command(hub, tmp_path, "info", "--model", HUB_MODEL)
    assert "backbone: complete, as a smaller copy (4bit)" in done.stdout and "MB as 4bit" in done.stdout.replace(
        "GB", "MB"
    )
    done = command(hub, tmp_path, "download", "--bits", "4", "--parts", "backbone", "vae")
    assert done.stdout.strip() == str(root) and not hub.requests
    done = command(hub, tmp_path, "info", "--model", HUB_MODEL, "--precision", "bf16")
    assert done.returncode == 1 and f"llada2-mlx download {HUB_MODEL}" in done.stderr
    done = command(hub, tmp_path, "download", "--parts", "backbone")
    assert done.returncode == 0 and lying(hub, tmp_path).keys() == shards_of(hub).keys()


def test_the_commands_that_draw_fetch_with_the_bits_that_they_are_told(hub: Hub, tmp_path: Path) -> None:
    words = ("chat", "--model", HUB_MODEL, "--precision", "4bit", "--max-new-tokens", "32", "--steps", "1")
    options = {"env": environment(hub, tmp_path / "home"), "text": True, "capture_output": True, "input": "hello\n"}
    done = subprocess.run([sys.executable, "-m", "llada2_mlx.cli", *words], **options)
    assert done.returncode == 0, done.stderr
    assert list(store(tmp_path).glob("snapshots/*/mlx-4bit/config.json")) and not lying(hub, tmp_path)


@pytest.mark.parametrize(("words", "message"), [
    (["--bits", "4", "--parts", "vae"], "name backbone among the --parts"),
    (["no-model", "--bits", "4"], "no-model is no hub id"),
    ([str(Path(__file__).parent), "--bits", "8"], "llada2-mlx convert"),
])  # fmt: skip
def test_the_commands_that_cannot_be(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["download", *words]) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_most_files_is_what_the_documents_say() -> None:
    assert fetch.MOST_FILES == 3
