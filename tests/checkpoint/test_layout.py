"""Broken and incomplete checkpoints: each an error that names what and where; and how whole ones are read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from published import BACKBONE as PUBLISHED
from safetensors.torch import load_file, save_file
from synthetic import BACKBONE, Sizes, tiny, write_backbone

from llada2_mlx import cli, tasks
from llada2_mlx.backbone.denoising import Method
from llada2_mlx.backbone.handle import Backbone
from llada2_mlx.backbone.network import LLaDA2
from llada2_mlx.backbone.weights import published_names
from llada2_mlx.checkpoint.layout import (
    BUILT_IN,
    TOLD,
    Checkpoint,
    Part,
    cached_ids,
    listed_ids,
    model_folders,
    resolve,
)
from llada2_mlx.errors import CheckpointError, RequestError
from llada2_mlx.imaging import load_part
from llada2_mlx.progress import Progress

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a tiny checkpoint, to break."""
    return Path(shutil.copytree(tiny(), tmp_path / "broken"))


def rewrite(path: Path, change: Callable[[dict], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def rewrite_json(path: Path, **values) -> None:
    content = json.loads(path.read_text())
    content.update(values)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def hidden_states(network):
    yield Progress("computing", 1, 1)
    return np.array(network(mx.arange(64)[None]).astype(mx.float32))


def opened(folder: Path) -> Backbone:
    return Backbone(Checkpoint(folder), "float32")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no complete backbone: config.json"):
        resolve(tmp_path, Part.BACKBONE)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no model folder"):
        resolve(tmp_path / "nothing" / "here", Part.BACKBONE)


@pytest.mark.parametrize(
    ("part", "gone"),
    [
        (Part.BACKBONE, "model*.safetensors"),
        (Part.BACKBONE, "tokenizer.json"),
        (Part.IMAGE_TOKENIZER, "image_tokenizer"),
        (Part.DECODER, "decoder"),
        (Part.DECODER, "image_tokenizer/sigvq_embedding.pt"),
        (Part.DECODER_TURBO, "decoder-turbo"),
        (Part.VAE, "vae/config.json"),
    ],
)
def test_a_missing_part_is_named(folder: Path, part: Part, gone: str) -> None:
    target = next(folder.glob(gone))
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(CheckpointError) as error:
        resolve(folder, part)
    assert part.value in str(error.value) and gone in str(error.value) and str(folder) in str(error.value)
    if part is Part.DECODER_TURBO:
        resolve(folder, Part.DECODER)  # the others are still there


def test_a_hub_model_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        CheckpointError, match="inclusionAI/LLaDA2.0-Uni is not on this machine, and HF_HUB_OFFLINE is set"
    ):
        resolve("inclusionAI/LLaDA2.0-Uni", Part.BACKBONE)


def test_a_hub_model_in_the_cache_needs_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cached = tmp_path / "models--someone--model"
    shutil.copytree(tiny(), cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve("someone/model", Part.BACKBONE, Part.VAE).root == cached / "snapshots" / "abc"
    (cached / "snapshots/abc/vae/config.json").unlink()
    with pytest.raises(CheckpointError, match="no complete VAE: vae/config.json"):
        resolve("someone/model", Part.VAE)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    rewrite(folder / "model.safetensors", lambda tensors: tensors.pop(EXPERT))
    with pytest.raises(CheckpointError, match=f"missing: {EXPERT}"):
        opened(folder)


def test_an_unexpected_tensor_is_named(folder: Path) -> None:
    rewrite(folder / "model.safetensors", lambda tensors: tensors.update(extra=torch.zeros(2)))
    with pytest.raises(CheckpointError, match=r"unexpected: extra in model\.safetensors"):
        opened(folder)


def test_a_wrong_shape_is_named(folder: Path) -> None:
    rewrite(folder / "model.safetensors", lambda tensors: tensors.update({EXPERT: torch.zeros(5, 7)}))
    with pytest.raises(CheckpointError, match=rf"{EXPERT} in model\.safetensors is \[5, 7\] instead of \[32, 64\]"):
        opened(folder)


@pytest.mark.parametrize(("name", "part"), [
    ("model.safetensors", Part.BACKBONE),
    ("image_tokenizer/image_tokenizer.safetensors", Part.IMAGE_TOKENIZER),
    ("image_tokenizer/sigvq_embedding.pt", Part.DECODER),
    ("decoder/decoder_model.safetensors", Part.DECODER),
    ("vae/diffusion_pytorch_model.safetensors", Part.VAE),
])  # fmt: skip
@pytest.mark.parametrize("kept", [0.6, 0.0])
def test_a_truncated_file_is_named(folder: Path, name: str, part: Part, kept: float) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(CheckpointError, match="truncated or damaged") as error:
        opened(folder) if part is Part.BACKBONE else load_part(Checkpoint(folder), part)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", [EXPERT, "model.norm.weight", "model.layers.2.mlp.gate.expert_bias", "lm_head.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_reported_at_the_first_pass(folder: Path, name: str, value: float) -> None:
    rewrite(folder / "model.safetensors", lambda tensors: tensors[name].view(-1)[:1].fill_(value))
    backbone = opened(folder)  # opening reads no weight
    with pytest.raises(CheckpointError, match=f"not finite .* in {name}"):
        tasks.text_to_vq(backbone, "a cat")
    assert not backbone.loaded


@pytest.mark.parametrize(("name", "part", "tensor"), [
    ("image_tokenizer/image_tokenizer.safetensors", Part.IMAGE_TOKENIZER, "model.visual.blocks.0.norm1.weight"),
    ("decoder-turbo/decoder_model.safetensors", Part.DECODER_TURBO, "layers.0.attention.to_q.weight"),
    ("vae/diffusion_pytorch_model.safetensors", Part.VAE, "decoder.conv_in.bias"),
])  # fmt: skip
@pytest.mark.parametrize("fault", ["nan", "missing", "unexpected", "shape"])
def test_faults_in_the_image_parts_are_named(folder: Path, name: str, part: Part, tensor: str, fault: str) -> None:
    faults = {
        "nan": lambda tensors: tensors[tensor].fill_(float("nan")),
        "missing": lambda tensors: tensors.pop(tensor),
        "unexpected": lambda tensors: tensors.update({tensor + ".extra": torch.zeros(1)}),
        "shape": lambda tensors: tensors.update({tensor: torch.zeros(1, 2, 3)}),
    }
    rewrite(folder / name, faults[fault])
    with pytest.raises(CheckpointError) as error:
        load_part(Checkpoint(folder), part)
    own_name = tensor.removeprefix("model.visual.")
    assert own_name in str(error.value) and str(folder / name) in str(error.value)


def test_a_prior_of_another_model_is_refused(folder: Path) -> None:
    path = folder / "image_tokenizer/sigvq_embedding.pt"
    prior = torch.load(path, weights_only=True)
    prior["prior_projector.net.2.weight"], prior["prior_projector.net.2.bias"] = torch.zeros(48, 32), torch.zeros(48)
    torch.save(prior, path)
    with pytest.raises(CheckpointError, match="gives 48 features .* takes 32"):
        load_part(Checkpoint(folder), Part.DECODER)


def test_an_index_without_its_file(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weight_map = {"lm_head.weight": "model-00001-of-00002.safetensors", EXPERT: "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="no complete backbone: model-00002-of-00002.safetensors is not there"):
        opened(folder)


def test_shards_without_an_index(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="no complete backbone: model.safetensors.index.json is not there"):
        opened(folder)


def test_shards_and_one_file_give_the_same(folder: Path) -> None:
    prompt = "a cat"
    expected = tasks.text_to_vq(opened(folder), prompt).grid
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in shards.items():
        save_file({name: tensors[name] for name in own}, folder / file)
    weight_map = {name: file for file, own in shards.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert tasks.text_to_vq(opened(folder), prompt).grid == expected


def test_another_name_of_the_decoder_file(folder: Path) -> None:
    (folder / "decoder/decoder_model.safetensors").rename(folder / "decoder/model.safetensors")
    load_part(Checkpoint(folder), Part.DECODER)
    shutil.copy(folder / "decoder/model.safetensors", folder / "decoder/other.safetensors")
    with pytest.raises(CheckpointError, match="exactly one"):
        load_part(Checkpoint(folder), Part.DECODER)


def test_a_tokenizer_without_the_mask_token(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<|mask|>", "<|other|>"))
    backbone = opened(folder)
    with pytest.raises(CheckpointError, match=r"has no token <\|mask\|>"):
        tasks.text_to_vq(backbone, "a cat")
    assert not backbone.loaded


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": "qwen3"}'])
def test_a_config_that_is_none(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="config.json"):
        opened(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": None}, "lacks num_experts"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'; only 'silu'"),
        ({"use_bias": True}, "use_bias = True"),
        ({"hidden_size": "wide"}, "hidden_size = 'wide'; a number"),
        ({"hidden_size": float("nan")}, "hidden_size = nan; a number"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps = inf; a number"),
        ({"hidden_size": 0}, "hidden_size = 0; it has to be larger"),
        ({"num_hidden_layers": -1}, "num_hidden_layers = -1; it has to be larger"),
        ({"n_group": 3}, "n_group has to divide num_experts"),
        ({"topk_group": 5}, "topk_group cannot be larger than n_group"),
        ({"n_group": 16}, "a group needs two experts"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok cannot be larger"),
        ({"num_key_value_heads": 3}, "num_key_value_heads has to divide"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor times head_dim"),
        ({"image_token_offset": 10_000}, "image_token_offset has to be inside the vocabulary"),
        ({"rope_parameters": [1]}, "rope_parameters = .* an object is needed"),
        ({"num_hidden_layers": 4}, "missing: model.layers.3"),
        # would take for ever to build
        ({"num_hidden_layers": 2**31}, "num_hidden_layers = 2.14748e.09; no network has more than 512"),
        ({"num_experts": 2**20}, "num_experts = 1.04858e.06; no network has more than 4096"),
        ({"vocab_size": 2**40}, "vocab_size = .*; no network has more than 1073741824"),
    ],
)
def test_a_config_that_does_not_fit(folder: Path, change: dict, message: str) -> None:
    rewrite_json(folder / "config.json", **change)
    with pytest.raises(CheckpointError, match=message):
        opened(folder)


def opened_variant(tmp_path: Path, **changes) -> Backbone:
    write_backbone(tmp_path, Sizes(replace(BACKBONE, **changes)), torch.float32)
    return opened(tmp_path)


def test_a_single_expert_keeps_its_own_score(tmp_path: Path) -> None:
    def gate(network):
        yield Progress("computing", 1, 1)
        router, x = network.model.layers[1].mlp.gate, mx.random.normal((5, 64), key=mx.random.key(0))
        experts, weights = router(x)
        scores = mx.sigmoid(x @ router.weight.T)
        return np.array(weights), np.array(mx.take_along_axis(scores, experts, axis=-1) * router.scale)

    weights, expected = opened_variant(tmp_path, num_experts_per_tok=1).run(gate)
    assert weights.shape == (5, 1) and weights == pytest.approx(expected)


@pytest.mark.parametrize("published", [0, None])
def test_no_shared_expert(tmp_path: Path, published: int | None) -> None:
    opened_variant(tmp_path, num_shared_experts=0)
    rewrite_json(tmp_path / "config.json", num_shared_experts=published)
    # what a network with a shared expert of no width saves
    empty = {f"model.layers.1.mlp.shared_experts.{name}_proj.weight": torch.zeros(0, 64) for name in ("gate", "up")}
    rewrite(tmp_path / "model.safetensors", lambda tensors: tensors.update(empty))
    assert tasks.text_to_vq(opened(tmp_path), "a cat").grid.height == 8


@pytest.mark.parametrize("changes", [
    {"first_k_dense_replace": 0, "num_shared_experts": 2},
    {"first_k_dense_replace": 3, "num_attention_heads": 2, "head_dim": 24},
    {"n_group": 1, "topk_group": 1, "num_key_value_heads": 4},
    {"num_experts": 1, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1},
    {"topk_group": 4, "vocab_size": 512 + 37, "num_hidden_layers": 2},
], ids=str)  # fmt: skip
def test_other_sizes(tmp_path: Path, changes: dict) -> None:
    backbone = opened_variant(tmp_path, **changes)
    grids = [tasks.text_to_vq(backbone, "a cat", method=method).grid for method in Method]
    assert grids[0] == grids[1] == grids[2]


def test_weights_of_another_type_are_refused(folder: Path) -> None:
    rewrite(folder / "model.safetensors", lambda tensors: tensors.update({EXPERT: tensors[EXPERT].to(torch.int32)}))
    with pytest.raises(CheckpointError, match=f"{EXPERT} in .* is stored as I32"):
        opened(folder)
    rewrite(folder / "vae/diffusion_pytorch_model.safetensors", lambda tensors: tensors.update(
        {name: tensor.to(torch.int32) for name, tensor in tensors.items()}))  # fmt: skip
    with pytest.raises(CheckpointError, match="only weights in BF16"):
        load_part(Checkpoint(folder), Part.VAE)


@pytest.mark.parametrize(("name", "part", "change"), [
    ("image_tokenizer/config.json", Part.IMAGE_TOKENIZER, {"vision_config": []}),
    ("image_tokenizer/config.json", Part.IMAGE_TOKENIZER, {"vq_config": {"num_embeddings": "many"}}),
    ("image_tokenizer/config.json", Part.IMAGE_TOKENIZER, {"vision_config": {"patch_size": 14}}),
    ("decoder/config.json", Part.DECODER, {"n_heads": 0}),
    ("decoder/config.json", Part.DECODER, {"axes_dims": "wide"}),
    ("vae/config.json", Part.VAE, {"scaling_factor": "big"}),
    ("vae/config.json", Part.VAE, {"block_out_channels": [3]}),
    ("vae/config.json", Part.VAE, {"shift_factor": "null"}),
    # would take for ever to build, or all memory
    ("image_tokenizer/config.json", Part.IMAGE_TOKENIZER, {"vision_config": {"depth": 2**31}}),
    ("decoder/config.json", Part.DECODER, {"n_layers": 2**31}),
    ("decoder/config.json", Part.DECODER, {"axes_lens": [2**40, 512, 512]}),
    ("vae/config.json", Part.VAE, {"layers_per_block": 2**31}),
])  # fmt: skip
def test_configs_of_the_image_parts_that_do_not_fit(folder: Path, name: str, part: Part, change: dict) -> None:
    rewrite_json(folder / name, **change)
    with pytest.raises(CheckpointError) as error:
        load_part(Checkpoint(folder), part)
    assert str(folder / Path(name).parent) in str(error.value)


def test_of_many_missing_tensors_a_few_are_named(folder: Path) -> None:
    config = json.loads((folder / "image_tokenizer/config.json").read_text())
    rewrite_json(folder / "image_tokenizer/config.json", vision_config=config["vision_config"] | {"depth": 40})
    with pytest.raises(CheckpointError, match="missing: .* more") as error:
        load_part(Checkpoint(folder), Part.IMAGE_TOKENIZER)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("weight_map", [[], "all", {"lm_head.weight": 1}])
def test_an_index_that_is_none(folder: Path, weight_map) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="no usable weight_map"):
        resolve(folder, Part.BACKBONE)


@pytest.mark.parametrize("sizes", [256, {"drawing": "abc"}, {"drawing": -256}, {"editing": 100}, {"thinking": 256},
                                   {"upscale": 3}, {"upscale": True}])  # fmt: skip
def test_image_sizes_that_are_none(folder: Path, sizes) -> None:
    rewrite_json(folder / "config.json", image_sizes=sizes)
    with pytest.raises(CheckpointError, match="image_sizes"):
        tasks.text_to_vq(opened(folder), "a cat")


def test_a_published_config_with_code_in_it_runs_none(folder: Path) -> None:
    rewrite_json(folder / "config.json", auto_map={"AutoConfig": "configuration_llada2uni_moe.LLaDA2MoeConfig"}, rope_theta=None,
                 rope_parameters={"rope_type": "default", "rope_theta": 600000, "partial_rotary_factor": 0.5})  # fmt: skip
    rewrite_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_other.Tokenizer", None]})
    assert opened(folder).config.rope_theta == 600000
    assert opened(folder).tokens.encode("a cat")


def test_precision(folder: Path) -> None:
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    assert Backbone(Checkpoint(folder), "auto").dtype == (mx.float32 if on_cpu else mx.bfloat16)
    half, full = Backbone(Checkpoint(folder), "bf16"), Backbone(Checkpoint(folder), "float32")
    assert half.size < full.size and (on_cpu or half.size < 0.6 * full.size)
    for backbone, dtype in ((half, mx.bfloat16), (full, mx.float32)):
        backbone.load()
        assert sum(value.nbytes for _, value in tree_flatten(backbone._model.parameters())) == backbone.size
        gate = backbone._model.model.layers[1].mlp.gate
        assert backbone._model.lm_head.weight.dtype == dtype
        assert gate.weight.dtype == gate.expert_bias.dtype == mx.float32
    hidden = [backbone.run(hidden_states) for backbone in (half, full)]
    # the weights are stored in bf16, so that the two differ by rounding, and by experts chosen otherwise at near-ties
    error = np.linalg.norm(hidden[0] - hidden[1], axis=-1) / np.linalg.norm(hidden[1], axis=-1)
    assert 0 < np.median(error) < 0.05
    with pytest.raises(RequestError, match="int3"):
        Backbone(Checkpoint(folder), "int3")


def test_weights_are_read_on_first_use_and_again_after_they_were_let_go(folder: Path) -> None:
    backbone = opened(folder)
    assert not backbone.loaded
    phases = []
    first = tasks.text_to_vq(backbone, "a cat", on_step=lambda progress: phases.append(progress.phase)).grid
    assert backbone.loaded and phases[0] == "loading weights"
    backbone.unload()
    assert not backbone.loaded
    assert tasks.text_to_vq(backbone, "a cat").grid == first


def test_experts_are_stacked_without_a_second_copy_of_the_model(tmp_path: Path) -> None:
    wide = replace(BACKBONE, num_hidden_layers=6, moe_intermediate_size=256, hidden_size=256, intermediate_size=256)
    tmp_path.joinpath("wide").mkdir()
    write_backbone(tmp_path / "wide", Sizes(wide), torch.float32)
    backbone = Backbone(Checkpoint(tmp_path / "wide"), "float32")
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    backbone.load()
    stack = 4 * 16 * 256 * 256  # one projection of one layer's experts, in bytes
    assert backbone.size > 12 * stack
    assert mx.get_active_memory() - before >= 0.99 * backbone.size
    assert mx.get_peak_memory() - before <= backbone.size + 4 * stack


def test_loading_can_be_cancelled(folder: Path) -> None:
    backbone = opened(folder)

    def cancel(progress) -> None:
        if progress.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        backbone.load(cancel)
    assert not backbone.loaded
    backbone.load()
    assert backbone.loaded


def test_names_of_the_published_checkpoint_are_all_known() -> None:
    """The published index has 14,813 tensors; the network asks for as many with the published config."""
    names = [
        name
        for parameter, value in tree_flatten(LLaDA2(PUBLISHED).parameters())
        for name in published_names(parameter, value.shape)
    ]
    assert len(names) == len(set(names)) == 14813
    assert PUBLISHED.rotary_dim == 64 and PUBLISHED.codebook_size == 16384


def _copied(folder: Path) -> Checkpoint:
    """A copy of the built-in model, to change."""
    shutil.copytree(BUILT_IN, folder)
    return Checkpoint(folder)


def test_hidden_files_are_never_a_models(tmp_path):
    model = _copied(tmp_path / "model")
    before = {part: model.files(part) for part in Part}
    for path in [path for path in model.root.rglob("*") if path.is_file()]:
        (path.parent / f"._{path.name}").write_bytes(b"\0" * 4096)
    (model.root / ".DS_Store").write_bytes(b"\0")
    assert {part: model.files(part) for part in Part} == before
    model.require(*Part)
    assert model.backbone_tensors()
    assert model.only_safetensors("vae").parent.name == "vae"
    model.only_safetensors("vae").unlink()
    assert model.missing(Part.VAE) == ["vae/*.safetensors"]


def test_two_files_of_weights_are_refused_before_the_work(tmp_path):
    model = _copied(tmp_path / "model")
    (model.root / "vae/second.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="has 2 safetensors files; exactly one"):
        model.require(Part.VAE)


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/outside.safetensors", "a/../../b", "..\\b", "C:b", "._model.safetensors", "", "a\0b"],
)
def test_an_index_names_only_files_inside_the_folder(tmp_path, name):
    model = _copied(tmp_path / "model")
    (model.root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    for look in (lambda: model.missing(Part.BACKBONE), model.backbone_tensors):
        with pytest.raises(CheckpointError, match="no file of this model"):
            look()


def test_a_folder_that_cannot_be_read_costs_only_itself(tmp_path, monkeypatch):
    for name in ("good", "closed", "garbled/snapshots", "garbled/refs", ".hidden"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "garbled/refs/main").write_bytes(b"\xff\xfe")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    listdir = os.listdir

    def refusing(path):
        if Path(path).name in ("closed", "away"):
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr("os.listdir", refusing)
    found, problems = model_folders([tmp_path / "none", tmp_path / "away", tmp_path])
    assert found == {"good": tmp_path / "good"}
    for name in ("away", "closed", "garbled", "broken", "loop"):
        assert any(f"/{name} cannot be read" in problem for problem in problems), name
    assert len(problems) == 5


def test_what_a_toy_knows_is_text_or_nothing(folder: Path) -> None:
    for world, expected in (("circles", "circles"), (None, ""), (["circles"], "")):
        rewrite_json(folder / "config.json", world=world)
        assert Checkpoint(folder).world == expected


@pytest.mark.parametrize("name", ["vae/second.safetensors", "decoder/second.safetensors", "model-second.safetensors"])
def test_two_files_of_weights_are_not_complete(folder: Path, name: str, capsys: pytest.CaptureFixture) -> None:
    part = next(part for part in Part if part.name.lower() == (Path(name).parent.name or "backbone"))
    assert not Checkpoint(folder).missing(part)
    shutil.copy(next((folder / name).parent.glob("*.safetensors")), folder / name)
    assert Checkpoint(folder).missing(part)
    assert cli.main(["info", "--model", str(folder)]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)
    assert "complete" != lines[part.value] and all(
        lines[other.value] == "complete" for other in TOLD if other is not part
    )
    if part is not Part.BACKBONE:
        assert "2 files, where exactly one is expected" in lines[part.value] and Path(name).name in lines[part.value]


SPOILT = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "broken link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "loop": lambda path: (path.unlink(), path.symlink_to(path.name)),
}


@pytest.mark.parametrize(("name", "part", "how"), [(name, part, how) for how in SPOILT for name, part in [
    ("model.safetensors", Part.BACKBONE),
    ("tokenizer.json", Part.BACKBONE),
    ("image_tokenizer/sigvq_embedding.pt", Part.DECODER),
    ("image_tokenizer/image_tokenizer.safetensors", Part.IMAGE_TOKENIZER),
    ("vae/diffusion_pytorch_model.safetensors", Part.VAE),
    ("vae/config.json", Part.VAE),
] if how != "longer" or not name.endswith(".pt")])  # fmt: skip
def test_what_is_not_whole_is_missing(
    folder: Path, name: str, part: Part, how: str, capsys: pytest.CaptureFixture
) -> None:
    if how == "cut" and name.endswith(".json"):
        (folder / name).write_text((folder / name).read_text().strip())  # a line's end may go
    SPOILT[how](folder / name)
    assert Checkpoint(folder).missing(part)
    with pytest.raises(CheckpointError, match=f"{folder}.*({Path(name).name}|{Path(name).suffix})"):
        resolve(folder, part)
    assert cli.main(["info", "--model", str(folder)]) == 0
    told = capsys.readouterr().out
    assert f"{part.value}: complete" not in told and f"{part.value}: " in told


def test_info_of_a_folder_with_an_index_that_is_none(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")
    assert cli.main(["info", "--model", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "has no usable weight_map" in told and "VAE: complete" in told


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_a_part_that_cannot_be_read_costs_only_itself(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, error: OSError
) -> None:
    real = {name: getattr(os, name) for name in ("stat", "scandir", "listdir", "open")}

    def refusing(name: str) -> Callable:
        def call(path, *arguments, **options):
            if isinstance(path, (str, os.PathLike)) and str(path).startswith(str(folder / "vae")):
                raise error
            return real[name](path, *arguments, **options)

        return call

    for name in real:
        monkeypatch.setattr(os, name, refusing(name))
    checkpoint = Checkpoint(folder)
    assert checkpoint.missing(Part.VAE) and not checkpoint.missing(Part.DECODER) and not checkpoint.files(Part.VAE)
    assert checkpoint.weight_bytes(Part.VAE) == 0
    with pytest.raises(CheckpointError, match=f"vae/config.json cannot be read .{error.strerror}"):
        resolve(folder, Part.VAE)
    assert cli.main(["info", "--model", str(folder)]) == 0
    told = capsys.readouterr().out
    assert f"vae/config.json cannot be read ({error.strerror})" in told and "turbo decoder: complete" in told
    with pytest.raises(CheckpointError, match=f"vae cannot be read .{error.strerror}"):
        resolve(folder / "vae", Part.VAE)


@pytest.mark.parametrize("model", ["~nobody-has-this-name/model", "a\0b", "x" * 5000, "owner/" + "x" * 300, ""])
def test_a_model_that_is_no_path(model: str) -> None:
    with pytest.raises(CheckpointError, match="There is no model folder|cannot be read|no complete"):
        resolve(model, Part.VAE)


def test_a_fingerprint_without_the_file_that_vanished(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, looks, real = Checkpoint(folder), [], os.stat
    before = checkpoint.fingerprint(Part.VAE, Part.DECODER)
    gone = folder / "vae/config.json"

    def stat(path, **options):
        if isinstance(path, (str, os.PathLike)) and Path(path) == gone:
            looks.append(path)
            if len(looks) > listing:
                raise OSError(116, "Stale file handle")
        return real(path, **options)

    monkeypatch.setattr(os, "stat", stat)
    listing = 10**6
    checkpoint.files(Part.VAE)
    listing = len(looks)  # the next time it is there when the folder is listed, and no longer after that
    looks.clear()
    found = checkpoint.fingerprint(Part.VAE, Part.DECODER)
    assert ("vae/config.json",) in found and len(looks) > listing
    assert [each for each in found if len(each) > 1] == [each for each in before if each[0] != "vae/config.json"]


@pytest.mark.parametrize("name", ["model.safetensors", "vae/diffusion_pytorch_model.safetensors", "tokenizer.json"])
def test_a_damaged_file_in_the_hubs_cache_says_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    root = Path(shutil.copytree(tiny(), tmp_path / "models--someone--model/snapshots/abc"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    if name == "tokenizer.json":
        (root / name).write_text("{}")
    else:
        rewrite(root / name, lambda tensors: next(iter(tensors.values())).view(-1)[:1].fill_(float("nan")))
    with pytest.raises(CheckpointError, match="Download it again with: llada2-mlx download someone/model$"):
        load_part(Checkpoint(root), Part.VAE) if name.startswith("vae") else tasks.text_to_vq(opened(root), "a cat")
    (root / name).write_bytes(b"half")
    part = Part.VAE if name.startswith("vae") else Part.BACKBONE
    with pytest.raises(CheckpointError, match="Download it again with: llada2-mlx download someone/model$"):
        resolve(root, part)
    (root / name).unlink()
    with pytest.raises(CheckpointError, match=f"with: llada2-mlx download someone/model --parts {part.word}$"):
        resolve(root, part)


# --- hub models to choose from ------------------------------------------------------------------------------------


def test_ids_are_listed_in_a_file_one_a_line(tmp_path: Path) -> None:
    first, second, none = (tmp_path / name for name in ("first", "second", "none"))
    for folder in (first, second):
        folder.mkdir()
    (first / "hub.txt").write_bytes(
        b"\xef\xbb\xbf# what friends made\r\nsomeone/LLaDA2-4bit  # small\r\n\r\nnot an id\n../etc\nname-alone\n"
    )
    (second / "hub.txt").write_text("someone/LLaDA2-4bit\nother/one\na/b/c")
    found, problems = listed_ids([first, none, second])
    assert found == ["someone/LLaDA2-4bit", "other/one"]
    assert [line.split(": ")[0] for line in problems] == [
        *(f"{first / 'hub.txt'}, line {number}" for number in (4, 5, 6)),
        f"{second / 'hub.txt'}, line 3",
    ]
    assert "'not an id' is no hub id such as" in problems[0] and "Write one id a line" in problems[0]


def test_a_list_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "hub.txt").write_bytes(b"someone/\xff\xfe")
    found, (problem,) = listed_ids([tmp_path])
    assert not found and "hub.txt cannot be read (it is no text in UTF-8)" in problem
    (tmp_path / "hub.txt").unlink()
    (tmp_path / "hub.txt").mkdir()
    found, (problem,) = listed_ids([tmp_path])
    assert not found and "hub.txt cannot be read (Is a directory)" in problem


def test_models_of_the_layout_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert cached_ids() == []  # there is no cache

    def cache(name: str, config: str | None) -> Path:
        store = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        (store / "snapshots/abc").mkdir(parents=True)
        (store / "refs").mkdir()
        (store / "refs/main").write_text("abc")
        if config is not None:
            (store / "snapshots/abc/config.json").write_text(config)
        return store

    ours = (tiny() / "config.json").read_text()
    cache("z/ours", ours)
    cache("a/ours-too", ours)
    cache("a/another", json.dumps({"model_type": "qwen3"}))
    cache("a/broken", "{")
    cache("a/parts-alone", None)
    (cache("a/no-revision", ours) / "refs/main").unlink()
    (cache("a/strange-revision", ours) / "refs/main").write_text("../..")
    (tmp_path / "cache/models--a--file").write_text("no folder")
    assert cached_ids() == ["a/ours-too", "z/ours"]
