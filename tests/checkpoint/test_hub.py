"""The hub's real client against a hub that is served on this machine."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import PAGE, Answer, Hub, environment, is_large, serving, talk_to
from safetensors.torch import load_file, save_file
from synthetic import tiny

from llada2_mlx.checkpoint import hub as hub_module
from llada2_mlx.checkpoint.layout import HUB_MODEL, Part, resolve
from llada2_mlx.errors import CheckpointError
from llada2_mlx.progress import Progress

SHARDS = [f"model-0000{index}-of-00002.safetensors" for index in (1, 2)]
TEXTS = {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"}
PRIOR = "image_tokenizer/sigvq_embedding.pt"
PARTS = {
    Part.BACKBONE: TEXTS | set(SHARDS),
    Part.IMAGE_TOKENIZER: {
        f"image_tokenizer/{name}" for name in ("config.json", "preprocessor_config.json", "image_tokenizer.safetensors")
    },
    Part.PRIOR: {PRIOR},
    Part.DECODER: {"decoder/config.json", "decoder/decoder_model.safetensors", PRIOR},
    Part.DECODER_TURBO: {"decoder-turbo/config.json", "decoder-turbo/decoder_model.safetensors", PRIOR},
    Part.VAE: {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"},
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as the hub has it: the backbone in shards, and files that nobody asks for."""
    folder = Path(shutil.copytree(tiny(), tmp_path_factory.mktemp("hub") / "model"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: SHARDS[index % 2] for index, name in enumerate(sorted(weights))}
    for shard in SHARDS:
        save_file({name: weights[name] for name, file in files.items() if file == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "README.md").write_text("A model.")
    (folder / "modeling_llada2.py").write_text("raise RuntimeError('never run')")
    return folder


@pytest.fixture
def hub(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the model, to which the client in this process talks, and an empty cache."""
    with serving(published, HUB_MODEL) as served:
        talk_to(served, tmp_path / "cache", monkeypatch)
        yield served
    huggingface_hub.close_session()


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def refused(*parts: Part, model: str = HUB_MODEL) -> str:
    """The one sentence, or two, with which a model cannot be had."""
    with pytest.raises(CheckpointError) as error:
        resolve(model, *parts)
    assert "\n" not in str(error.value)
    return str(error.value)


def interrupted(hub: Hub, shard: str = SHARDS[1], after: int = 20_000) -> None:
    """A download that ends in the middle of a shard, because the hub goes away."""
    hub.cut[shard] = after

    def fail(progress: Progress) -> None:
        if hub.ranges(shard):
            hub.broken.add(shard)

    with pytest.raises(CheckpointError, match="could not be downloaded: the hub answered 503 .* what has arrived"):
        resolve(HUB_MODEL, Part.BACKBONE, on_step=fail)
    hub.cut.clear()
    hub.broken.clear()


@pytest.mark.parametrize("part", Part)
def test_only_the_files_of_a_part_are_fetched(hub: Hub, published: Path, part: Part) -> None:
    checkpoint = resolve(HUB_MODEL, part)
    assert hub.fetched() == PARTS[part]
    assert files(checkpoint.root) == PARTS[part]
    for name in PARTS[part]:
        assert (checkpoint.root / name).read_bytes() == (published / name).read_bytes()


def test_what_is_there_is_taken_without_a_request(hub: Hub) -> None:
    first = resolve(HUB_MODEL, Part.BACKBONE, Part.VAE)
    hub.requests.clear()
    assert resolve(HUB_MODEL, Part.VAE) == resolve(HUB_MODEL, Part.BACKBONE, Part.VAE) == first
    assert resolve(HUB_MODEL) == first
    assert not hub.requests


def test_parts_fetched_one_after_the_other_are_in_one_folder(hub: Hub) -> None:
    roots = {resolve(HUB_MODEL, part).root for part in Part}
    assert roots == {resolve(HUB_MODEL, *Part).root}
    assert len(hub.ranges(PRIOR)) == 1  # both decoders have it


def test_a_model_that_changed_on_the_hub_is_completed_as_it_was(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve(HUB_MODEL, Part.VAE)
    look = huggingface_hub.HfApi.model_info
    asked = []

    def model_info(api, repo, *, revision=None, **options):
        asked.append(revision)
        return look(api, repo, revision=revision, **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    assert resolve(HUB_MODEL, Part.BACKBONE).root == first.root
    assert asked == [first.root.name]
    # and where the hub no longer has the old revision, the new one is taken
    hub.commit = "b" * 40
    moved = resolve(HUB_MODEL, Part.DECODER)
    assert moved.root.name == hub.commit and not moved.missing(Part.DECODER)
    assert resolve(HUB_MODEL, Part.DECODER) == moved
    hub.requests.clear()
    assert resolve(HUB_MODEL, Part.VAE).root == moved.root
    assert not any("/cdn/" in line for line in hub.requests)  # its weights did not change


def test_progress_goes_up_to_the_total_in_the_callers_thread(hub: Hub, published: Path) -> None:
    hub.pause, seen, threads = 0.01, [], set()

    def note(progress: Progress) -> None:
        threads.add(threading.current_thread())
        if progress.phase == "downloading":
            assert progress.in_bytes
            seen.append((progress.done, progress.total))

    resolve(HUB_MODEL, Part.BACKBONE, on_step=note)
    total = sum((published / name).stat().st_size for name in PARTS[Part.BACKBONE])
    assert {of for _, of in seen} == {total}
    done = [at for at, _ in seen]
    assert done == sorted(done) and done[-1] == total and len(set(done)) > 3
    assert threads == {threading.current_thread()}


def test_a_connection_that_breaks_is_taken_up_again(hub: Hub) -> None:
    name = PRIOR
    size = (hub.folder / name).stat().st_size
    hub.cut[name] = size // 2
    resolve(HUB_MODEL, Part.DECODER)
    begun = hub.ranges(name)
    assert begun[0] == 0 and len(begun) > 1 and begun == sorted(begun) and begun[1] >= size // 2 - 4096


def test_an_interrupted_download_is_gone_on_with(hub: Hub, published: Path) -> None:
    interrupted(hub)
    before, arrived = list(hub.ranges(SHARDS[0])), []
    hub.requests.clear()
    checkpoint = resolve(HUB_MODEL, Part.BACKBONE, on_step=lambda progress: arrived.append(progress))
    (begun,) = hub.ranges(SHARDS[1])
    assert 20_000 - 4096 <= begun <= 20_000
    assert len(before) == 1 and not hub.ranges(SHARDS[0])  # it had arrived
    downloading = [progress.done for progress in arrived if progress.phase == "downloading"]
    assert downloading[0] >= begun  # the bar begins where it was
    for shard in SHARDS:
        assert (checkpoint.root / shard).read_bytes() == (published / shard).read_bytes()


def test_two_halves_that_do_not_fit_are_noticed(hub: Hub) -> None:
    interrupted(hub)
    (partial,) = (Path(huggingface_hub.constants.HF_HUB_CACHE)).rglob("*.incomplete")
    with partial.open("r+b") as content:
        content.write(b"another")
    assert f"{SHARDS[1]} arrived damaged" in refused(Part.BACKBONE)
    assert not resolve(HUB_MODEL, Part.BACKBONE).missing(Part.BACKBONE)


def test_half_a_download_without_a_network_says_what_is_missing(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(hub)
    hub.requests.clear()
    offline(monkeypatch)
    said = refused(Part.BACKBONE)
    assert f"no complete backbone: {SHARDS[1]} is not there" in said and "HF_HUB_OFFLINE is set" in said
    assert not hub.requests
    # the same after a download by another program, which began with the weights
    index = resolve(HUB_MODEL).root / "model.safetensors.index.json"
    index.unlink()
    assert "no complete backbone: model.safetensors.index.json is not there" in refused(Part.BACKBONE)
    assert "no complete VAE: vae/config.json, vae/*.safetensors is not there" in refused(Part.VAE)


def test_without_a_network(hub: Hub) -> None:
    hub.server.shutdown()
    hub.server.server_close()
    said = refused(Part.VAE)
    assert f"{HUB_MODEL} is not on this machine, and it could not be downloaded from {hub.address}" in said
    assert "Check the network and try again" in said


def test_a_network_that_goes_away_in_the_middle(hub: Hub) -> None:
    resolve(HUB_MODEL, Part.VAE)
    hub.cut = dict.fromkeys(SHARDS, 8192)

    def disconnect(progress: Progress) -> None:
        if all(map(hub.ranges, SHARDS)) and hub.server.fileno() >= 0:
            hub.server.shutdown()
            hub.server.server_close()

    with pytest.raises(CheckpointError, match="no complete backbone: .* could not be downloaded .* Check the network"):
        resolve(HUB_MODEL, Part.BACKBONE, on_step=disconnect)
    assert hub.server.fileno() < 0


def test_a_whole_model_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve(HUB_MODEL, *Part)
    hub.requests.clear()
    offline(monkeypatch)
    assert resolve(HUB_MODEL, *Part) == first and not hub.requests
    assert "someone/else is not on this machine, and HF_HUB_OFFLINE is set" in refused(Part.VAE, model="someone/else")


def test_an_id_that_the_hub_does_not_have(hub: Hub) -> None:
    said = refused(Part.VAE, model="inclusionAI/LLaDA2.0-Unix")
    assert said.startswith("The hub has no model 'inclusionAI/LLaDA2.0-Unix'")


def test_a_model_of_another_layout_is_refused_before_anything_is_fetched(
    published: Path, hub: Hub, tmp_path: Path
) -> None:
    hub.folder = tmp_path / "other"
    shutil.copytree(published, hub.folder, ignore=shutil.ignore_patterns("decoder-turbo"))
    assert f"{HUB_MODEL} on the hub has no decoder-turbo/config.json" in refused(Part.BACKBONE, Part.DECODER_TURBO)
    assert not hub.fetched()


def test_a_disk_without_room_is_refused_before_anything_is_fetched(
    hub: Hub, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum((published / name).stat().st_size for name in PARTS[Part.DECODER])
    usage, free = shutil.disk_usage, hub_module.RESERVE + needed
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=free - 1))
    said = refused(Part.DECODER)
    assert f"needs {needed / 1e6:.1f} MB more" in said and "are free on that disk. Make room" in said
    assert not hub.fetched()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=free))
    resolve(HUB_MODEL, Part.DECODER)


def test_a_disk_that_does_not_tell_its_room(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(shutil, "disk_usage", refuse)
    assert not resolve(HUB_MODEL, Part.VAE).missing(Part.VAE)


def test_what_has_arrived_needs_no_more_room(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(hub)
    rest = (hub.folder / SHARDS[1]).stat().st_size - 20_000 + 4096
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=hub_module.RESERVE + rest))
    resolve(HUB_MODEL, Part.BACKBONE)


class Cancelled(BaseException):
    """As ComfyUI's, no Exception."""


def test_cancelling_ends_the_download_and_keeps_what_has_arrived(hub: Hub, tmp_path: Path) -> None:
    hub.pause = 0.2  # so slow that it would take a minute
    blobs = tmp_path / "cache/models--inclusionAI--LLaDA2.0-Uni/blobs"
    asked = []

    def size(path: Path) -> int:
        try:
            return path.stat().st_size
        except FileNotFoundError:
            return 0  # it is whole meanwhile, under its own name

    def cancel(progress: Progress) -> None:
        # of the shards: the tokenizer's file is small, and may be whole the moment after
        if any(size(path) > 8192 for shard in SHARDS for path in blobs.glob(f"{hub.blobs()[shard]}*.incomplete")):
            asked.append(time.monotonic())
            raise Cancelled

    with pytest.raises(Cancelled):
        resolve(HUB_MODEL, Part.BACKBONE, on_step=cancel)
    assert time.monotonic() - asked[0] < 3
    assert not [thread for thread in threading.enumerate() if thread.name == "download"]
    hub.pause = 0
    hub.requests.clear()
    resolve(HUB_MODEL, Part.BACKBONE)
    assert any(hub.ranges(shard)[0] >= 8192 for shard in SHARDS)


@pytest.mark.parametrize("error", [OSError("no terminal"), CheckpointError("another's")])
def test_what_on_step_raises_reaches_the_caller_as_it_is(hub: Hub, error: Exception) -> None:
    def fail(progress: Progress) -> None:
        if progress.phase == "downloading":
            raise error

    with pytest.raises(type(error)) as raised:
        resolve(HUB_MODEL, Part.VAE, on_step=fail)
    assert raised.value is error


def test_two_programs_fetch_a_file_once(hub: Hub) -> None:
    hub.pause, found = 0.02, []
    threads = [threading.Thread(target=lambda: found.append(resolve(HUB_MODEL, Part.VAE))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and found[0] == found[1]
    assert hub.ranges("vae/diffusion_pytorch_model.safetensors") == [0]


def test_a_cache_that_cannot_be_written(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder")
    assert "cannot be written" in refused(Part.VAE)


def test_a_path_in_the_hubs_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    found = resolve(HUB_MODEL, Part.VAE)
    offline(monkeypatch)
    hub.requests.clear()
    model = found.root.parent.parent
    assert model.name == "models--inclusionAI--LLaDA2.0-Uni"
    assert resolve(found.root, Part.VAE).root == resolve(model, Part.VAE).root == found.root
    assert not hub.requests
    with pytest.raises(CheckpointError, match="has no complete backbone"):
        resolve(model, Part.BACKBONE)


# --- what is damaged ----------------------------------------------------------------------------------------------


def blob(name: str) -> Path:
    """Where the cache has a file's content."""
    return (resolve(HUB_MODEL).root / name).resolve()


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.unlink()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.touch()
    elif how == "another's":
        path.write_bytes(bytes(255 - byte for byte in content))
    elif how == "a bit":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif how == "longer":
        path.write_bytes(content + b"}")
    elif how == "loop":
        path.symlink_to(path)
    elif how == "broken link":
        path.symlink_to(path.parent / "nowhere")


DAMAGES = ["cut", "empty", "another's", "a bit", "longer", "loop", "broken link", "gone"]


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", [SHARDS[0], "config.json", "model.safetensors.index.json", PRIOR])
def test_a_damaged_file_is_downloaded_again_when_a_download_is_asked_for(
    hub: Hub, published: Path, name: str, how: str
) -> None:
    root = resolve(HUB_MODEL, Part.BACKBONE, Part.DECODER).root
    damage(blob(name), how)
    hub.requests.clear()
    assert resolve(HUB_MODEL, Part.BACKBONE, Part.DECODER, verify=True).root == root
    assert (root / name).read_bytes() == (published / name).read_bytes()
    assert hub.fetched() == {name}
    hub.requests.clear()
    resolve(HUB_MODEL, Part.BACKBONE, Part.DECODER, verify=True)
    assert not hub.requests  # it is whole


@pytest.mark.parametrize("how", ["cut", "empty", "another's", "longer", "loop", "broken link", "gone"])
def test_a_file_that_is_seen_to_be_damaged_is_downloaded_again_by_itself(
    hub: Hub, published: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    root = resolve(HUB_MODEL, Part.BACKBONE).root
    damage(blob(SHARDS[1]), how)
    with monkeypatch.context() as context:
        offline(context)
        said = refused(Part.BACKBONE)
        assert f"no complete backbone: {SHARDS[1]} " in said and "HF_HUB_OFFLINE is set" in said
    hub.requests.clear()
    assert resolve(HUB_MODEL, Part.BACKBONE).root == root
    assert (root / SHARDS[1]).read_bytes() == (published / SHARDS[1]).read_bytes()
    assert hub.fetched() == {SHARDS[1]}


def test_a_damaged_name_is_no_way_around_the_sum(hub: Hub, published: Path) -> None:
    root = resolve(HUB_MODEL, Part.BACKBONE).root
    damage(blob(SHARDS[0]), "a bit")
    (root / SHARDS[0]).unlink()
    resolve(HUB_MODEL, Part.BACKBONE)
    assert (root / SHARDS[0]).read_bytes() == (published / SHARDS[0]).read_bytes()


def test_a_download_checks_the_parts_that_it_was_not_asked_for(hub: Hub, published: Path) -> None:
    root, name = resolve(HUB_MODEL, Part.BACKBONE, Part.DECODER).root, "decoder/decoder_model.safetensors"
    damage(blob(name), "a bit")
    hub.requests.clear()
    resolve(HUB_MODEL, Part.BACKBONE, verify=True)
    assert (root / name).read_bytes() == (published / name).read_bytes() and hub.fetched() == {name}


def test_a_damaged_file_without_a_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(HUB_MODEL, Part.VAE)
    damage(blob("vae/config.json"), "a bit")
    offline(monkeypatch)
    with pytest.raises(CheckpointError, match="damaged .*vae/config.json, and HF_HUB_OFFLINE is set"):
        resolve(HUB_MODEL, Part.VAE, verify=True)


@pytest.mark.parametrize("place", ["blob", "name", "partial"])
def test_a_folder_in_the_place_of_a_file_stays(hub: Hub, place: str) -> None:
    root, name = resolve(HUB_MODEL, Part.VAE).root, "vae/diffusion_pytorch_model.safetensors"
    content = blob(name)
    folder = {"blob": content, "name": root / name, "partial": content.with_name(f"{content.name}.incomplete")}[place]
    content.unlink()
    folder.unlink(missing_ok=True)
    folder.mkdir()
    (folder / "mine").touch()
    for verify in (False, True):
        with pytest.raises(CheckpointError, match=f"{folder} cannot be written .* Change that and try again"):
            resolve(HUB_MODEL, Part.VAE, verify=verify)
    assert (folder / "mine").exists()
    shutil.rmtree(folder)
    resolve(HUB_MODEL, Part.VAE)


@pytest.mark.parametrize("content", [b"\xff\xfe", None])
def test_a_cache_whose_revision_cannot_be_read(hub: Hub, content: bytes | None) -> None:
    store = resolve(HUB_MODEL, Part.VAE).root.parent.parent
    (store / "refs/main").unlink()
    (store / "refs/main").mkdir() if content is None else (store / "refs/main").write_bytes(content)
    assert f"What {store} holds cannot be read" in refused(Part.VAE)
    shutil.rmtree(store)  # as the message says
    resolve(HUB_MODEL, Part.VAE)


@pytest.mark.parametrize("content", [b"..", b"../..", b"", b"a\0b"])
def test_a_cache_that_names_no_revision_is_told_it_anew(hub: Hub, content: bytes) -> None:
    root = resolve(HUB_MODEL, Part.VAE).root
    store, main = root.parent.parent, root.parent.parent / "refs/main"
    main.write_bytes(content)
    assert "is no revision" in refused(Part.VAE, model=str(store))
    hub.requests.clear()
    assert resolve(HUB_MODEL, Part.VAE).root == root and main.read_text() == hub.commit
    assert not hub.fetched()  # the files are there


@pytest.mark.parametrize("place", ["cache", "cache/models--inclusionAI--LLaDA2.0-Uni", "cache/.locks"])
@pytest.mark.parametrize("kind", ["file", "circle"])
def test_a_cache_that_is_none(hub: Hub, tmp_path: Path, place: str, kind: str) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).touch() if kind == "file" else (tmp_path / place).symlink_to(tmp_path / place)
    for verify in (False, True):
        with pytest.raises(CheckpointError, match=f"{tmp_path / place}.* cannot be (read|written)"):
            resolve(HUB_MODEL, Part.VAE, verify=verify)
    (tmp_path / place).unlink()
    resolve(HUB_MODEL, Part.VAE)


def test_a_check_writes_nothing(hub: Hub, tmp_path: Path) -> None:
    def state() -> dict[str, int]:
        return {str(path): path.lstat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]}

    resolve(HUB_MODEL, *Part)
    before, seen = state(), []
    resolve(HUB_MODEL, *Part, verify=True, on_step=seen.append)
    assert state() == before  # as a cache that is read-only needs it
    assert {each.phase for each in seen} == {"checking files"} and seen[-1].done == seen[-1].total > 10**5


def test_a_check_can_be_cancelled(hub: Hub) -> None:
    resolve(HUB_MODEL, Part.VAE)

    def cancel(progress: Progress) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        resolve(HUB_MODEL, Part.VAE, verify=True, on_step=cancel)
    assert not [thread for thread in threading.enumerate() if thread.name == "download"]


def test_a_name_that_leads_elsewhere(hub: Hub, published: Path, tmp_path: Path) -> None:
    root, name = resolve(HUB_MODEL, Part.VAE).root, "vae/config.json"
    (tmp_path / "mine.json").write_text("{}")
    (root / name).unlink()
    (root / name).symlink_to(tmp_path / "mine.json")
    resolve(HUB_MODEL, Part.VAE, verify=True)
    assert (root / name).read_bytes() == (published / name).read_bytes()
    assert (tmp_path / "mine.json").read_text() == "{}"


# --- a disk without links -----------------------------------------------------------------------------------------


@pytest.fixture
def without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("os.symlink", refuse)
    monkeypatch.setattr("huggingface_hub.file_download._are_symlinks_supported_in_dir", {})


def test_without_links_a_file_is_stored_once(hub: Hub, published: Path, tmp_path: Path, without_links: None) -> None:
    root = resolve(HUB_MODEL, *Part).root
    wanted = {name: (published / name).read_bytes() for name in set().union(*PARTS.values())}
    assert {name: (root / name).read_bytes() for name in files(root)} == wanted
    stored = [path for path in (tmp_path / "cache/models--inclusionAI--LLaDA2.0-Uni").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in stored) == sum(map(len, wanted.values())) + len("a" * 40)
    hub.requests.clear()
    assert resolve(HUB_MODEL, *Part).root == root and not hub.requests


@pytest.mark.parametrize("how", DAMAGES[:5])
def test_without_links_a_damaged_file_is_downloaded_again(
    hub: Hub, published: Path, without_links: None, how: str
) -> None:
    root = resolve(HUB_MODEL, Part.BACKBONE, Part.VAE).root
    for name in (SHARDS[0], "vae/config.json"):
        damage(root / name, how)
    hub.requests.clear()
    resolve(HUB_MODEL, Part.BACKBONE, verify=True)
    assert hub.fetched() == {SHARDS[0], "vae/config.json"}
    for name in hub.fetched():
        assert (root / name).read_bytes() == (published / name).read_bytes()


FULL = """
import errno, os, resource, sys
from llada2_mlx.cli import main

def refuse(*_, **__):
    raise OSError(errno.ENOTSUP, "Operation not supported")

if sys.argv[1] == "no links":
    os.symlink = refuse
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))  # as a disk that is full after so much of each file
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.parametrize("links", ["links", "no links"])
def test_a_disk_that_fills_up(hub: Hub, published: Path, tmp_path: Path, links: str) -> None:
    home, words = tmp_path / "home", ("download", "--parts", "backbone")
    limit = (published / SHARDS[1]).stat().st_size - 5000
    done = python(hub, home, "-c", FULL, links, str(limit), *words, capture_output=True)
    assert done.returncode == 1 and "cannot be written (File too large)" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and "what has arrived is kept" in done.stderr
    named = [path for path in home.rglob("snapshots/*/*.safetensors") if path.name == SHARDS[1]]
    assert not named
    hub.requests.clear()
    done = python(hub, home, "-c", FULL, links, "1000000000", *words, capture_output=True)
    assert done.returncode == 0, done.stderr
    for shard in SHARDS:
        assert (Path(done.stdout.strip()) / shard).read_bytes() == (published / shard).read_bytes()
    assert hub.ranges(SHARDS[1])[0] > 0


# --- answers that are not the hub's -------------------------------------------------------------------------------

REDIRECT = Answer(302, b"", {"Location": "/sign-in"})


def kept(cache: Path) -> list[Path]:
    """What the cache holds of a sign-in page, or anything at all that is no lock."""
    found = [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return [path for path in found if b"Sign in" in path.read_bytes() or not path.stat().st_size]


@pytest.mark.parametrize(
    "answer",
    [
        *(Answer(status) for status in (200, 201, 203, 400, 401, 403, 404, 407, 429, 500, 503, 511)),
        *(Answer(status, b"Please sign in", {"Content-Type": "text/plain"}) for status in (200, 401, 403, 404, 511)),
        *(Answer(status, b'{"login": "here"}', {"Content-Type": "application/json"}) for status in (200, 401, 404)),
        REDIRECT,
        Answer(302, b"", {"Location": "/api/models/inclusionAI/LLaDA2.0-Uni"}),
        Answer(302, b"", {}),
        Answer(204, b"", {}),
        Answer(200, b"", {}),
    ],
    ids=lambda answer: f"{answer.status} {answer.tags.get('Content-Type') or answer.tags.get('Location', '')}",
)
def test_a_sign_in_page_in_place_of_the_hub(hub: Hub, tmp_path: Path, answer: Answer) -> None:
    hub.instead["api"] = answer
    said = refused(Part.VAE)
    assert "is not on this machine, and it could not be downloaded: what answered for" in said
    assert "is not the hub" in said and "sign in and try again" in said
    assert not kept(tmp_path / "cache")
    hub.instead.clear()
    resolve(HUB_MODEL, Part.VAE)


def test_an_answer_of_a_hub_that_is_out_of_order(hub: Hub) -> None:
    hub.instead["api"] = Answer(503, b"", {})
    assert "the hub answered 503 Service Unavailable. Wait a little" in refused(Part.VAE)
    hub.instead["api"] = Answer(503)  # a web page, as of what stands before the hub
    assert "or the hub is out of order" in refused(Part.VAE)


def test_what_the_hub_refuses_is_told_by_its_words(hub: Hub) -> None:
    for status, tags, content in (
        (401, {"X-Error-Message": "Invalid username or password."}, b""),
        (401, {"Content-Type": "application/json"}, b'{"error": "Invalid username or password."}'),
        (404, {"X-Error-Code": "RepoNotFound"}, b""),
    ):
        hub.instead["api"] = Answer(status, content, tags)
        assert refused(Part.VAE).startswith(f"The hub has no model {HUB_MODEL!r}")
    hub.instead["api"] = Answer(403, b"", {"X-Error-Code": "GatedRepo"})
    assert "only to those who asked for it" in refused(Part.VAE)


def test_the_command_with_a_page_in_place_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    hub.instead["api"] = Answer()
    done = command(hub, tmp_path / "home", "download", "--parts", "vae", capture_output=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "is not the hub" in done.stderr, done.stderr


def listed(**changes: object) -> Callable[[dict], object]:
    """The hub's answer with another entry for the VAE's config, or without what is None."""

    def change(about: dict) -> object:
        for each in about["siblings"]:
            if each["rfilename"] == "vae/config.json":
                each.update(changes)
        return about

    return change


@pytest.mark.parametrize(
    "changed",
    [
        lambda about: [about],
        lambda about: None,
        lambda about: {},
        lambda about: {"error": "none"},
        lambda about: about | {"sha": 7},
        lambda about: about | {"sha": "../../outside"},
        lambda about: {key: value for key, value in about.items() if key != "sha"},
        lambda about: {key: value for key, value in about.items() if key != "siblings"},
        lambda about: about | {"siblings": "vae/config.json"},
        lambda about: about | {"siblings": ["vae/config.json"]},
        lambda about: about | {"siblings": {"vae/config.json": 1}},
        lambda about: about | {"siblings": [*about["siblings"], {"rfilename": "../outside"}]},
        lambda about: about | {"siblings": [*about["siblings"], about["siblings"][0]]},
        listed(rfilename="vae/../../../config.json"),
        listed(rfilename="/etc/vae/config.json"),
        listed(rfilename="vae\\config.json"),
        listed(rfilename=None),
        listed(rfilename=["vae/config.json"]),
        listed(size=-1),
        listed(size="many"),
        listed(size=None),
        listed(size=1.5),
        listed(size=True),
        listed(blobId="../../../outside"),
        listed(blobId=None),
        listed(blobId=7),
        listed(lfs={"size": 5}),
        listed(lfs={"size": -5, "sha256": "a" * 64, "pointerSize": 130}),
        listed(lfs={"size": 5, "sha256": "a/../b", "pointerSize": 130}),
        listed(lfs="a" * 64),
    ],
)
def test_json_of_another_shape(hub: Hub, tmp_path: Path, changed: Callable[[dict], object]) -> None:
    hub.changed = changed
    assert "is not the hub" in refused(Part.VAE)
    assert not hub.fetched() and not [path for path in tmp_path.rglob("*") if path.is_file()]


FOREIGN = {
    "a page": lambda size: Answer(),
    "a page that says no length": lambda size: Answer(length=False),
    "a page of the same length": lambda size: Answer(content=PAGE.ljust(size)[:size]),
    "no kind": lambda size: Answer(tags={}),
    "no kind, no length": lambda size: Answer(tags={}, length=False),
    "no kind, the same length": lambda size: Answer(content=PAGE.ljust(size)[:size], tags={}),
    "no kind, no length, too long": lambda size: Answer(content=PAGE.ljust(size + 9000), tags={}, length=False),
    "redirect": lambda size: REDIRECT,
    "401": lambda size: Answer(401),
    "404, plain": lambda size: Answer(404, b"Sign in", {"Content-Type": "text/plain"}),
    "511": lambda size: Answer(511),
    "empty": lambda size: Answer(200, b"", {}),
    "a part that nobody asked for": lambda size: Answer(206, PAGE, {"Content-Range": f"bytes 5-90/{size}"}),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("name", ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"])
def test_a_page_in_place_of_a_file(hub: Hub, published: Path, tmp_path: Path, name: str, kind: str) -> None:
    hub.instead[name] = FOREIGN[kind]((published / name).stat().st_size)
    said = refused(Part.VAE)
    same = kind == "no kind, the same length"
    assert "arrived damaged, and what had arrived was removed" in said if same else "is not the hub" in said
    assert not kept(tmp_path / "cache") and not list((tmp_path / "cache").rglob(f"snapshots/*/{name}"))
    hub.instead.clear()
    root = resolve(HUB_MODEL, Part.VAE).root
    assert (root / name).read_bytes() == (published / name).read_bytes()


@pytest.mark.parametrize("kind", [kind for kind in FOREIGN if "too long" not in kind])
def test_a_page_in_place_of_the_rest_of_a_file(hub: Hub, published: Path, tmp_path: Path, kind: str) -> None:
    interrupted(hub)
    (partial,) = (tmp_path / "cache").rglob("*.incomplete")
    before = partial.read_bytes()
    assert len(before) > 10_000
    hub.instead[SHARDS[1]] = FOREIGN[kind]((published / SHARDS[1]).stat().st_size)
    said = refused(Part.BACKBONE)
    if kind == "no kind, the same length":  # only the sum tells
        assert "arrived damaged" in said and not partial.exists()
    else:
        assert "is not the hub" in said and partial.read_bytes() == before
    assert not kept(tmp_path / "cache")
    hub.instead.clear()
    assert not resolve(HUB_MODEL, Part.BACKBONE).missing(Part.BACKBONE)


def test_a_server_that_knows_no_parts_begins_again(hub: Hub, published: Path) -> None:
    interrupted(hub)
    hub.instead[SHARDS[1]] = Answer(200, (published / SHARDS[1]).read_bytes(), {})
    root = resolve(HUB_MODEL, Part.BACKBONE).root
    assert (root / SHARDS[1]).read_bytes() == (published / SHARDS[1]).read_bytes()


# --- hidden files and others that nobody wants --------------------------------------------------------------------


def test_hidden_files_on_the_hub_are_not_downloaded(hub: Hub, published: Path, tmp_path: Path) -> None:
    hub.folder = Path(shutil.copytree(published, tmp_path / "hidden"))
    for name in ("vae/._diffusion_pytorch_model.safetensors", "vae/.DS_Store", "._model.safetensors"):
        (hub.folder / name).write_bytes(b"\0\5\26\7")
    (hub.folder / "vae/old").mkdir()
    (hub.folder / "vae/old/model.safetensors").write_bytes(b"old")
    root = resolve(HUB_MODEL, Part.VAE, Part.BACKBONE).root
    assert files(root) == PARTS[Part.VAE] | PARTS[Part.BACKBONE] == hub.fetched()
    # nor do they stand for the file that is wanted
    (hub.folder / "decoder/decoder_model.safetensors").rename(hub.folder / "decoder/._decoder_model.safetensors")
    assert "on the hub has no decoder/*.safetensors" in refused(Part.DECODER)


def test_a_disk_without_locks(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert not resolve(HUB_MODEL, Part.VAE).missing(Part.VAE)


# --- the command --------------------------------------------------------------------------------------------------


def command(hub: Hub, cache: Path, *words: str, **options) -> subprocess.CompletedProcess:
    return python(hub, cache, "-m", "llada2_mlx.cli", *words, **options)


def python(hub: Hub, cache: Path, *words: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], env=environment(hub, cache), text=True, **options)


def test_the_command_fetches_what_it_is_told_and_says_where_it_is(hub: Hub, tmp_path: Path) -> None:
    done = command(hub, tmp_path / "home", "download", "--parts", "vae", "decoder", capture_output=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    root = Path(done.stdout.strip())
    assert root.is_dir() and root.is_relative_to(tmp_path / "home" / "hub")
    assert hub.fetched() == PARTS[Part.VAE] | PARTS[Part.DECODER]
    done = command(hub, tmp_path / "home", "download", capture_output=True)
    assert done.returncode == 0 and Path(done.stdout.strip()) == root
    assert files(root) == set().union(*PARTS.values())
    hub.requests.clear()
    done = command(hub, tmp_path / "home", "info", "--model", HUB_MODEL, capture_output=True)
    assert f"folder: {root}" in done.stdout and "missing" not in done.stdout and not hub.requests


def test_the_command_without_the_full_decoder(hub: Hub, tmp_path: Path) -> None:
    assert command(hub, tmp_path / "home", "download", HUB_MODEL, capture_output=True).returncode == 0
    assert not any(name.startswith("decoder/") for name in hub.fetched())
    assert hub.fetched() == set().union(*PARTS.values()) - {name for name in PARTS[Part.DECODER] if name != PRIOR}


def test_the_bar_in_a_terminal_counts_bytes(hub: Hub, tmp_path: Path, published: Path) -> None:
    hub.pause = 0.02
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    done = command(hub, tmp_path / "home", "download", "--parts", "vae", stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    total = sum((published / name).stat().st_size for name in PARTS[Part.VAE])
    assert done.returncode == 0 and "downloading" in shown
    assert re.search(rf"/{total / 1e3:.1f}k .*B/s", shown), shown


def test_the_commands_that_fail_say_one_line(hub: Hub, tmp_path: Path) -> None:
    for words, message in (
        (("download", "someone/nothing"), "The hub has no model 'someone/nothing'"),
        (("download", "no such model"), "There is no model folder no such model"),
        (("info", "--model", "someone/nothing"), "Download it with: llada2-mlx download someone/nothing"),
    ):
        done = command(hub, tmp_path / "home", *words, capture_output=True)
        assert done.returncode == 1 and done.stderr.startswith("llada2-mlx: ") and message in done.stderr
        assert done.stderr.count("\n") == 1


def test_the_hub_here_is_one_that_has_large_and_small_files(published: Path) -> None:
    names = files(published)
    assert any(map(is_large, names)) and not all(map(is_large, names))
