"""The hub's real client against a hub that is served on this machine."""

from __future__ import annotations

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
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import Hub, is_large, serving
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
        constants = "huggingface_hub.constants."
        monkeypatch.setattr(constants + "ENDPOINT", served.address)
        template = served.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants + "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants + "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants + "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants + "DOWNLOAD_CHUNK_SIZE", 4096)  # the files here are smaller than its own 10 MB
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        huggingface_hub.close_session()
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

    def cancel(progress: Progress) -> None:
        if any(path.stat().st_size > 8192 for path in blobs.glob("*.incomplete")):
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


# --- the command --------------------------------------------------------------------------------------------------


def command(hub: Hub, cache: Path, *words: str, **options) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(cache), "NO_PROXY": "127.0.0.1,localhost"}
    return subprocess.run([sys.executable, "-m", "llada2_mlx.cli", *words], env=environment, text=True, **options)


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
