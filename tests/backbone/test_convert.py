"""Few bits: what is kept how, copies that are whole or not there, and what they cost in accuracy."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from published import BACKBONE as PUBLISHED
from safetensors.torch import load_file, save_file
from synthetic import BACKBONE, Sizes, tiny, write_backbone

from llada2_mlx import __version__, cli, tasks
from llada2_mlx.backbone import precision
from llada2_mlx.backbone.convert import convert, is_current, own_copy
from llada2_mlx.backbone.handle import Backbone
from llada2_mlx.backbone.weights import SCALE, SIDE
from llada2_mlx.checkpoint.copies import STATE
from llada2_mlx.checkpoint.layout import Checkpoint, Part, safetensors_header
from llada2_mlx.errors import CheckpointError, LLaDA2Error, RequestError
from llada2_mlx.progress import Progress, ignore
from llada2_mlx.worker import MLXWorker


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    return Checkpoint(Path(shutil.copytree(tiny(), tmp_path / "source")))


def converted(source: Checkpoint, copy: Path, bits: int, on_step=ignore, **options) -> Checkpoint:
    return MLXWorker().drive(convert(source, copy, bits, **options), on_step)


def change(source: Checkpoint, to: str = "yes") -> None:
    """Make the source another one: a header that says something else."""
    path = source.root / "model.safetensors"
    save_file(load_file(path), path, {"changed": to})


def hidden_states(network, ids):
    yield Progress("computing", 1, 1)
    return np.array(network(mx.array(ids)).astype(mx.float32))


def weights(network):
    yield Progress("reading", 1, 1)
    return {name: np.array(value.astype(mx.float32)) for name, value in tree_flatten(network.parameters())}


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Median over positions of the relative error of hidden states."""
    return float(np.median(np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)))


# --- the scheme ---------------------------------------------------------------------------------------------------


def test_experts_have_the_bits_and_all_else_has_more() -> None:
    block = precision.scheme(PUBLISHED, 4)
    expert, head = "model.layers.3.mlp.switch_mlp.up_proj", "lm_head"
    assert precision.quantization_of(block, expert) == {"group_size": 64, "bits": 4}
    for path in (head, "model.word_embeddings", "model.layers.0.mlp.up_proj", "model.layers.5.attention.dense"):
        assert precision.quantization_of(block, path) == {"group_size": 64, "bits": 8}
    network = dict(tree_flatten(precision.build(PUBLISHED, block).parameters()))
    for kept in (
        "model.layers.3.mlp.gate.weight",
        "model.norm.weight",
        "model.layers.3.attention.key_layernorm.weight",
    ):
        assert network[kept].dtype == mx.float32 and kept.replace("weight", "scales") not in network
    assert network[f"{expert}.weight"].shape == (256, 512, 2048 * 4 // 32)


def test_a_width_that_groups_do_not_divide() -> None:
    block = precision.scheme(replace(BACKBONE, moe_intermediate_size=96), 4, group_size=64)
    assert precision.quantization_of(block, "model.layers.1.mlp.switch_mlp.up_proj") == {"group_size": 64, "bits": 4}
    assert precision.quantization_of(block, "model.layers.1.mlp.switch_mlp.down_proj") == {"group_size": 32, "bits": 4}
    odd = precision.scheme(replace(BACKBONE, moe_intermediate_size=40), 4, group_size=64)
    assert precision.quantization_of(odd, "model.layers.1.mlp.switch_mlp.down_proj") is False


@pytest.mark.parametrize(("bits", "groups"), [(3, 64), (16, 64), (4, 48)])
def test_bits_that_there_are_not(bits: int, groups: int) -> None:
    with pytest.raises(RequestError, match="bits can be 8, 6 or 4"):
        precision.scheme(BACKBONE, bits, groups)


def test_auto_for_a_model_in_float32() -> None:
    sizes = {name: precision.memory_bytes(PUBLISHED, kind) for name, kind in precision.TYPES.items()}
    chosen, _ = precision.choose(PUBLISHED, "float32", int(sizes["bf16"] + 5e9))
    assert chosen == ("float32" if precision.on_cpu() else "bf16")


def test_auto_where_nothing_fits_says_so() -> None:
    chosen, reason = precision.choose(PUBLISHED, "bf16", int(8e9))
    size = "10.7 GB" if precision.on_cpu() else "9.7 GB"  # the scales of a network that runs in float32 are float32
    assert chosen == "4bit" and size in reason and "too large" in reason


def test_sizes_of_the_published_model() -> None:
    size = lambda bits: precision.memory_bytes(PUBLISHED, mx.bfloat16, precision.scheme(PUBLISHED, bits)) / 1e9
    assert 9 < size(4) < 10 and 17 < size(8) < 18


# --- copies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "most"), [(8, 0.04), (6, 0.08), (4, 0.3)])
def test_a_copy_is_near_to_its_source(checkpoint: Checkpoint, tmp_path: Path, bits: int, most: float) -> None:
    copy = converted(checkpoint, tmp_path / "copy", bits, group_size=32)
    small, whole = Backbone(copy), Backbone(checkpoint, "float32")
    assert small.precision == f"{bits}bit" and small.reason is None
    ids = [[(7 * i + 3) % whole.config.vocab_size for i in range(96)]]
    found, expected = (backbone.run(hidden_states, ids) for backbone in (small, whole))
    assert 0 < error(found, expected) < most
    assert small.run(weights)["model.layers.1.mlp.gate.weight"] == pytest.approx(
        whole.run(weights)["model.layers.1.mlp.gate.weight"]
    )


def test_a_copy_holds_what_the_loaded_network_holds(source: Checkpoint, tmp_path: Path) -> None:
    copy = Backbone(converted(source, tmp_path / "copy", 4))
    kept = copy.run(weights)
    assert copy.size == sum(value.nbytes for _, value in tree_flatten(copy.load().parameters())) and set(kept) == set(
        dict(tree_flatten(precision.build(copy.config, copy.checkpoint.quantization).parameters()))
    )
    up = "model.layers.2.mlp.switch_mlp.up_proj"
    stack = load_file(source.root / "model.safetensors")
    expert = stack["model.layers.2.mlp.experts.5.up_proj.weight"].float().numpy()
    step = kept[f"{up}.scales"][5].repeat(64, axis=-1)
    packed = np.array(copy.load().model.layers[2].mlp.switch_mlp.up_proj.weight[5])
    codes = np.stack([packed >> shift & 15 for shift in range(0, 32, 4)], axis=-1).reshape(expert.shape)
    rebuilt = codes * step + kept[f"{up}.biases"][5].repeat(64, axis=-1)
    assert np.abs(rebuilt - expert).max() <= 0.75 * np.abs(step).max()  # half a step, and bf16's rounding of the scales


def test_sixteen_bits_change_nothing(source: Checkpoint, tmp_path: Path) -> None:
    copy = converted(source, tmp_path / "copy", 16)
    assert copy.quantization is None and "model.layers.1.mlp.switch_mlp.up_proj.weight" in copy.backbone_tensors()
    found, expected = (Backbone(part, "float32").run(weights) for part in (copy, source))
    assert found.keys() == expected.keys() and all((found[name] == expected[name]).all() for name in found)


def test_a_few_bits_are_made_on_first_use_and_once(source: Checkpoint) -> None:
    def phases(backbone: Backbone) -> set[str]:
        seen = set()
        tasks.text_to_vq(backbone, "a cat", on_step=lambda progress: seen.add(progress.phase))
        return seen

    backbone = Backbone(source, "4bit")
    assert not own_copy(source, 4).exists()  # opening reads headers and writes nothing
    assert {"converting", "loading weights"} < phases(backbone)
    assert "converting" not in phases(Backbone(source, "4bit"))
    change(source)
    assert "converting" in phases(Backbone(source, "4bit"))
    assert Backbone(Checkpoint(own_copy(source, 4))).precision == "4bit"  # it is a model of its own
    assert is_current(own_copy(source, 4), source, 4)


@pytest.mark.parametrize("damage", [lambda shard: shard.unlink(), lambda shard: shard.write_bytes(b"half a file")])
def test_a_damaged_copy_is_made_again(source: Checkpoint, damage) -> None:
    copy = own_copy(source, 4)
    Backbone(source, "4bit").load()
    damage(sorted(copy.glob("model-*"))[1])
    assert not is_current(copy, source, 4)
    assert tasks.text_to_vq(Backbone(source, "4bit"), "a cat").grid.height == 8 and is_current(copy, source, 4)


def test_a_copy_may_lie_elsewhere_by_a_link(source: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    converted(source, tmp_path / "elsewhere/copy", 4)
    own_copy(source, 4).symlink_to(tmp_path / "elsewhere/copy")
    change(source)
    Backbone(source, "4bit").load()
    assert own_copy(source, 4).is_symlink() and is_current(tmp_path / "elsewhere/copy", source, 4)


def test_what_is_no_copy_is_not_replaced(source: Checkpoint) -> None:
    own_copy(source, 4).mkdir()
    (own_copy(source, 4) / "mine.txt").write_text("keep me")
    with pytest.raises(RequestError, match="but it holds something else"):
        Backbone(source, "4bit").load()
    assert [path.name for path in own_copy(source, 4).iterdir()] == ["mine.txt"]


def test_stopped_between_layers_it_goes_on(source: Checkpoint, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converted(source, tmp_path / "copy", 8, on_step=stop)
    assert not (tmp_path / "copy").exists()
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".copy.partial").glob("model-*")}
    assert len(written) == 3
    copy = converted(source, tmp_path / "copy", 8)
    assert written.items() <= {path.name: path.stat().st_mtime_ns for path in copy.root.glob("model-*")}.items()
    assert copy.missing(Part.BACKBONE) == [] and not list(tmp_path.glob(".copy*"))
    assert tasks.text_to_vq(Backbone(copy), "a cat").grid.height == 8


def test_a_layer_that_was_cut_short_is_written_again(source: Checkpoint, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converted(source, tmp_path / "copy", 8, on_step=stop)
    shard = sorted((tmp_path / ".copy.partial").glob("model-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    converted(source, tmp_path / "copy", 8)
    safetensors_header(tmp_path / "copy" / shard.name)


FULL = """
import resource, sys
from pathlib import Path
from llada2_mlx.checkpoint.layout import Checkpoint
from llada2_mlx.backbone.convert import convert
from llada2_mlx.worker import MLXWorker

resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, -1))  # as a disk that is full after 50 kB of each file
MLXWorker().drive(convert(Checkpoint(Path(sys.argv[1])), Path(sys.argv[2]), 8))
"""


def test_a_disk_that_fills_up(source: Checkpoint, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, source.root, tmp_path / "copy"], capture_output=True, timeout=120
    )
    told = done.stderr.decode().splitlines()[-1]
    assert "copy cannot be written (File too large)" in told and "what is done is kept" in told
    assert not (tmp_path / "copy").exists() and not list((tmp_path / ".copy.partial").glob(".*"))
    converted(source, tmp_path / "copy", 8)


def test_what_was_begun_of_another_source_is_not_taken(source: Checkpoint, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converted(source, tmp_path / "copy", 8, on_step=stop)
    tensors = load_file(source.root / "model.safetensors")
    tensors["model.word_embeddings.weight"] += 1
    save_file(tensors, source.root / "model.safetensors")
    copy = Backbone(converted(source, tmp_path / "copy", 8)).run(weights)
    assert np.median(copy["model.word_embeddings.biases"]) > -1  # was -3 or so: each row is 1 higher


KILLED = """
import os, signal, sys
from pathlib import Path
from llada2_mlx.checkpoint.layout import Checkpoint
from llada2_mlx.backbone import convert
from llada2_mlx.worker import MLXWorker
import mlx.core as mx

save, writes = mx.save_safetensors, 0
def save_and_die(file, *args):
    global writes
    writes += 1
    if writes == 3:
        file.write(b"half a file"); file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(file, *args)
mx.save_safetensors = save_and_die
MLXWorker().drive(convert.convert(Checkpoint(Path(sys.argv[1])), Path(sys.argv[2]), 8))
"""


def test_killed_while_it_writes_it_goes_on(source: Checkpoint, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    done = subprocess.run([sys.executable, "-c", KILLED, source.root, copy], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not copy.exists() and len(list((tmp_path / ".copy.partial").glob("model-*"))) == 2
    converted(source, copy, 8)
    assert not [path for path in copy.iterdir() if path.suffix == ".partial"]
    for path in copy.glob("*.safetensors"):
        safetensors_header(path)
    assert tasks.text_to_vq(Backbone(Checkpoint(copy)), "a cat").grid.height == 8


def test_two_at_once(source: Checkpoint, tmp_path: Path) -> None:
    worker, steps = MLXWorker(), convert(source, tmp_path / "copy", 8)
    worker.call(next, steps)
    with pytest.raises(LLaDA2Error, match="being written by another program"):
        converted(source, tmp_path / "copy", 8)
    worker.drive(steps)
    assert Checkpoint(tmp_path / "copy").missing(Part.BACKBONE) == []
    seen = []  # a third, which saw no copy before
    converted(source, tmp_path / "copy", 8, on_step=seen.append, replace=True)
    assert not seen


def test_no_room(source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"takes 0.\d MB in .* 0.0 MB are free"):
        converted(source, tmp_path / "copy", 8)
    assert not (tmp_path / "copy").exists() and not list(tmp_path.rglob("model-*"))


def test_what_is_refused(source: Checkpoint, tmp_path: Path) -> None:
    copy = converted(source, tmp_path / "copy", 8)
    with pytest.raises(RequestError, match="is there already"):
        converted(source, tmp_path / "copy", 8)
    with pytest.raises(RequestError, match="is quantised to 8 bits already"):
        converted(copy, tmp_path / "smaller", 4)
    for other in ("bf16", "float32", "4bit"):
        with pytest.raises(RequestError, match="quantised to 8 bits, and the lost precision cannot be restored"):
            Backbone(copy, other)
    for block in ([], {"bits": 8}, {"bits": 7, "group_size": 64}, {"bits": 4, "group_size": 32, "mode": "mxfp4"}):
        config = json.loads((source.root / "config.json").read_text())
        (source.root / "config.json").write_text(json.dumps(config | {"quantization": block}))
        with pytest.raises(CheckpointError, match="quantization that cannot be read"):
            Backbone(Checkpoint(source.root))
        with pytest.raises(CheckpointError, match="quantization that cannot be read"):
            converted(Checkpoint(source.root), tmp_path / "smaller", 4)


def test_a_copy_that_is_cut_short(source: Checkpoint, tmp_path: Path) -> None:
    copy = converted(source, tmp_path / "copy", 4)
    shard = sorted(copy.root.glob("model-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{shard.name} cannot be read: it is truncated"):
        Backbone(Checkpoint(copy.root))
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is not there"):
        Backbone(Checkpoint(copy.root))


def test_memory_of_a_conversion_is_a_layer(tmp_path: Path) -> None:
    wide = replace(BACKBONE, num_hidden_layers=8, moe_intermediate_size=256, hidden_size=256, intermediate_size=256)
    (tmp_path / "wide").mkdir()
    write_backbone(tmp_path / "wide", Sizes(wide), torch.bfloat16)
    worker = MLXWorker()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    worker.drive(convert(Checkpoint(tmp_path / "wide"), tmp_path / "copy", 4))
    layer = 2 * 3 * 16 * 256 * 256  # the experts of a layer, in bytes
    assert mx.get_peak_memory() - before < 1.5 * layer
    assert (tmp_path / "wide/model.safetensors").stat().st_size > 6 * layer


def test_opening_a_copy_reads_nothing(source: Checkpoint, tmp_path: Path) -> None:
    copy = converted(source, tmp_path / "copy", 4)
    before, began = mx.get_active_memory(), time.perf_counter()
    backbone = Backbone(copy)
    assert time.perf_counter() - began < 5 and mx.get_active_memory() - before < 0.1 * backbone.size
    mx.reset_peak_memory()
    backbone.load()
    assert mx.get_peak_memory() - before < 1.3 * backbone.size  # it is there once


# --- float8 -------------------------------------------------------------------------------------------------------


@pytest.fixture
def eight(source: Checkpoint) -> tuple[Checkpoint, dict[str, torch.Tensor]]:
    """A checkpoint with its matrices in float8, with a scale for each 128 x 128 block; and what they stand for.

    Matrices have several blocks each way, and parts of blocks at their ends."""
    wide = replace(BACKBONE, hidden_size=320, intermediate_size=448, moe_intermediate_size=192, num_experts=8)
    write_backbone(source.root, Sizes(wide), torch.bfloat16)
    tensors, meant = load_file(source.root / "model.safetensors"), {}
    for name, value in list(tensors.items()):
        if "proj" not in name and "query_key_value" not in name:
            continue
        rows, columns = (-(-side // SIDE) for side in value.shape)
        scale = torch.rand(rows, columns) / 100 + 0.005
        spread = scale.repeat_interleave(SIDE, 0)[: value.shape[0]].repeat_interleave(SIDE, 1)[:, : value.shape[1]]
        tensors[name] = (value.float() / spread).to(torch.float8_e4m3fn)
        tensors[name + SCALE] = scale
        meant[name] = tensors[name].float() * spread
    save_file(tensors, source.root / "model.safetensors")
    config = json.loads((source.root / "config.json").read_text())
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (source.root / "config.json").write_text(json.dumps(config | {"quantization_config": fp8}))
    return Checkpoint(source.root), meant


def test_float8_is_read_by_its_scales(eight) -> None:
    checkpoint, meant = eight
    found = Backbone(checkpoint, "float32").run(weights)
    assert len(meant) > 50 and {tuple(value.shape) for value in meant.values()} > {(192, 320), (320, 448)}
    for name, value in meant.items():
        if "experts." in name and "shared" not in name:
            left, right = name.split(".experts.")
            expert, projection = right.split(".", 1)
            mine = found[f"{left}.switch_mlp.{projection}"][int(expert)]
        else:
            mine = found[name]
        assert np.allclose(mine, value.numpy(), rtol=1e-6, atol=0)


def test_float8_can_be_converted(eight, tmp_path: Path) -> None:
    copy = converted(eight[0], tmp_path / "copy", 8)
    assert "quantization_config" not in copy.json("config.json")
    assert tasks.text_to_vq(Backbone(copy), "a cat").grid.height == 8


def test_float8_without_a_scale(eight) -> None:
    checkpoint, meant = eight
    tensors, name = load_file(checkpoint.root / "model.safetensors"), next(iter(meant))
    del tensors[name + SCALE]
    save_file(tensors, checkpoint.root / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"missing: {name}{SCALE}"):
        Backbone(checkpoint)


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, copy = Path(shutil.copytree(tiny(), tmp_path / "source")), tmp_path / "copy"
    assert cli.main(["convert", str(source), str(copy), "--bits", "4", "--group-size", "32"]) == 0
    cli_output = capsys.readouterr().out
    assert "copy: 0.00 GB" in cli_output
    assert Checkpoint(copy).quantization["bits"] == 4 and Checkpoint(copy).quantization["group_size"] == 32
    Checkpoint(copy).require(*Part)  # the other parts are there too
    decoder = "decoder-turbo/decoder_model.safetensors"
    assert (copy / decoder).stat().st_ino == (source / decoder).stat().st_ino  # and take no room
    assert "It has no" not in cli_output
    assert cli.main(["convert", str(source), str(copy)]) == 1
    assert "is there already" in capsys.readouterr().err
    assert STATE in {path.name for path in copy.iterdir()}


def test_the_command_adds_parts_that_arrive_later(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, copy = Path(shutil.copytree(tiny(), tmp_path / "source")), tmp_path / "copy"
    (source / "vae").rename(tmp_path / "vae")
    call = ["convert", str(source), str(copy), "--bits", "8"]
    assert cli.main(call) == 0
    assert f"It has no {Part.VAE.value}, because {source} has none" in capsys.readouterr().out
    (tmp_path / "vae").rename(source / "vae")
    monkeypatch.setattr("os.link", lambda source, target: Path("/nowhere/at/all").touch())  # as between two disks
    assert cli.main(call) == 0 and "It has no" not in capsys.readouterr().out
    shutil.rmtree(source)
    Checkpoint(copy).require(*Part)  # it stands alone


def test_times_do_not_say_whether_a_copy_is_current(source: Checkpoint, tmp_path: Path) -> None:
    converted(source, tmp_path / "copy", 8)
    for path in source.files(Part.BACKBONE):
        path.touch()
    assert is_current(tmp_path / "copy", source, 8)
    change(source)
    assert not is_current(tmp_path / "copy", source, 8)


@pytest.mark.parametrize("name", ["notes.txt", ".other.partial", "sub/config.json", "model.safetensors"])
def test_what_a_conversion_did_not_make_stays(source: Checkpoint, tmp_path: Path, name: str) -> None:
    stranger = tmp_path / ".copy.partial" / name
    stranger.parent.mkdir(parents=True)
    stranger.write_text("mine")
    with pytest.raises(RequestError, match=r"\.copy\.partial.* did not make"):
        converted(source, tmp_path / "copy", 8)
    assert stranger.read_text() == "mine"


def stopped(source: Checkpoint, copy: Path, after: int = 2) -> Path:
    """A conversion that was stopped; returns the folder in which it grew."""

    def stop(progress: Progress) -> None:
        if progress.done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converted(source, copy, 8, on_step=stop)
    return copy.with_name(f".{copy.name}.partial")


NAMES = [
    "config.json",
    "tokenizer.json",
    "tokenizer-notes.txt",
    "model-mine.safetensors",
    "model-00002-of-00009.safetensors",
    "model.safetensors.index.json",
    "vae/config.json",
    "notes/",
]


def put(path: Path, name: str) -> Path:
    """Somebody's own file, or folder, in a folder of a conversion."""
    if name.endswith("/"):
        (path / name).mkdir()
    else:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("mine")
    return path / name


@pytest.mark.parametrize("changed", [False, True], ids=["the same source", "another source"])
@pytest.mark.parametrize("name", NAMES)
def test_a_strangers_file_in_a_conversion_that_was_begun_stays(
    source: Checkpoint, tmp_path: Path, name: str, changed: bool
) -> None:
    mine = put(stopped(source, tmp_path / "copy"), name)
    if changed:
        change(source)
    with pytest.raises(RequestError, match=rf"\.copy\.partial/{name.partition('/')[0]}.* did not make"):
        converted(source, tmp_path / "copy", 8)
    assert mine.is_dir() or mine.read_text() == "mine"
    shutil.rmtree(mine) if mine.is_dir() else mine.unlink()
    if name.startswith("vae"):
        mine.parent.rmdir()
    assert converted(source, tmp_path / "copy", 8).backbone_tensors()


def test_a_strangers_file_in_the_place_of_one_that_was_made_stays(source: Checkpoint, tmp_path: Path) -> None:
    partial = stopped(source, tmp_path / "copy")
    mine = sorted(partial.glob("model-*"))[0]
    save_file({"mine": torch.ones(3)}, mine)
    before = mine.read_bytes()
    with pytest.raises(RequestError, match=f"{mine.name} .*did not make"):
        converted(source, tmp_path / "copy", 8)
    assert mine.read_bytes() == before


@pytest.mark.parametrize("name", ["notes.txt", "tokenizer_old.json", "model-mine.safetensors", "vae/mine.txt"])
def test_a_strangers_file_in_a_copy_that_is_no_longer_current_stays(source: Checkpoint, name: str) -> None:
    Backbone(source, "4bit").load()
    mine = put(own_copy(source, 4), name)
    change(source)
    with pytest.raises(RequestError, match=f"{name}?.*did not make|vae .*did not make"):
        Backbone(source, "4bit").load()
    assert mine.read_text() == "mine"
    mine.unlink()
    if name.startswith("vae"):
        mine.parent.rmdir()
    Backbone(source, "4bit").load()
    assert is_current(own_copy(source, 4), source, 4)


def test_a_strangers_file_in_the_place_of_the_lock_stays(source: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / ".copy.lock").write_text("mine")
    converted(source, tmp_path / "copy", 8)
    assert (tmp_path / ".copy.lock").read_text() == "mine"


def test_a_copy_with_its_parts_can_be_replaced(source: Checkpoint) -> None:
    copy = own_copy(source, 8)
    assert cli.main(["convert", str(source.root), str(copy), "--bits", "8"]) == 0
    Checkpoint(copy).require(*Part)
    (copy / ".DS_Store").write_bytes(b"\0")
    change(source)
    Backbone(source, "8bit").load()
    assert is_current(copy, source, 8)


class Killed(BaseException):
    """What ends a program at once, but in this process."""


def test_killed_anywhere_while_an_older_copy_is_removed_the_next_run_is_right(
    source: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, remove, removed = own_copy(source, 4), {name: getattr(os, name) for name in ("unlink", "rmdir")}, 0
    converted(source, copy, 4)
    for last in count(1):
        change(source, str(last))
        removed = 0

        def counted(name: str, path, last: int = last, **options) -> None:
            nonlocal removed
            # in the copy itself, whose files are removed by names that are relative to it too
            removed += os.fspath(path) == str(copy) or os.path.dirname(path) in ("", str(copy))
            if removed == last:
                raise Killed
            remove[name](path, **options)

        with monkeypatch.context() as patch:
            for name in remove:
                patch.setattr(os, name, partial(counted, name))
            try:
                converted(source, copy, 4, replace=True)
            except Killed:
                pass
        killed = removed >= last
        converted(source, copy, 4, replace=True)
        assert is_current(copy, source, 4) and not list(copy.parent.glob(".mlx-*"))
        if not killed:
            break
    assert last > len(list(copy.iterdir()))


def test_what_a_killed_run_had_begun_of_the_other_parts_is_removed(source: Checkpoint, tmp_path: Path) -> None:
    call = ["convert", str(source.root), str(tmp_path / "copy"), "--bits", "4"]
    assert cli.main(call) == 0
    for folder in (tmp_path / "copy", tmp_path / "copy/vae"):
        (folder / ".123-abc.partial").write_bytes(b"half a file")
    assert cli.main(call) == 0
    assert not list((tmp_path / "copy").rglob("*.partial"))


def test_a_copy_says_how_it_was_made(source: Checkpoint, tmp_path: Path) -> None:
    convert_it, about = (
        ["convert", str(source.root), str(tmp_path / "copy"), "--bits", "6"],
        tmp_path / "copy/README.md",
    )
    shutil.move(source.root / "vae", tmp_path / "vae")
    assert cli.main(convert_it) == 0
    told = about.read_text()
    assert told.startswith("---\nlibrary_name: mlx\ntags: ") and "base_model" not in told
    assert "# source, 6bit\n" in told and "Parts: backbone, image tokenizer, decoder, turbo decoder.\n" in told
    assert f"Made by ComfyUI-LLaDA2-MLX {__version__} with MLX {mx.__version__}:\n" in told
    shutil.move(tmp_path / "vae", source.root / "vae")
    assert cli.main(convert_it) == 0
    assert "turbo decoder, VAE.\n" in about.read_text()  # it grew
    about.write_text("What I found out about it.")
    assert cli.main(convert_it) == 0 and about.read_text() == "What I found out about it."


def test_a_disk_without_locks(source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert converted(source, tmp_path / "copy", 8).backbone_tensors()
