"""Hundreds of prompts of all templates on a real ComfyUI, with cancels, freed memory, switched and replaced models in between.

``make soak`` prints a line for each prompt, then a report; it fails where a result was wrong, memory
grew, or something was left behind. The random choices are those of ``--seed``.

Right means: a template that is queued again gives the same pixels and texts as the first time, whatever happened in
between; and what the detector reads in a picture that was drawn of a prompt alone is what the prompt says.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from threading import Timer

import client
import torch
from client import PACK, ROOT, WORKFLOWS, Comfy, Run, installed, serve, workflow
from PIL import Image
from safetensors.torch import load_file, save_file

from llada2_mlx.checkpoint.layout import BUILT_IN
from llada2_mlx.shapes.detector import read
from llada2_mlx.shapes.measures import prompts, same_layout
from llada2_mlx.shapes.world import Background, Colour, Kind, Pattern, Place, Scene, Shape, Size, Tone

SHAPES, SECOND = "Shapes (built in)", "second"  # the second is a copy, whose files are replaced
KEPT_BITS = (
    -4
)  # of the built-in model's bf16 weights the others lack the last two: what the second model becomes and was
WARM = 50  # prompts until everything has been loaded and every buffer has been used
ALLOWED = 50e6  # bytes between the first prompts after that and the last
client.START_TIMEOUT, client.RUN_TIMEOUT = 900, 900  # seconds: the machine may have other work
# glibc puts large arrays onto its heap after a while, where what is free lies in pieces between what is used and stays
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}
METER = Path(__file__).with_name("soak_meter.py")
VARIANTS = 2  # of a template: with as many prompts
SHIPPED = (
    "A large red circle in the top left and a small blue star in the bottom right",
    Scene(
        (
            Shape(Kind.CIRCLE, Colour.RED, Place.TOP_LEFT, Size.LARGE),
            Shape(Kind.STAR, Colour.BLUE, Place.BOTTOM_RIGHT, Size.SMALL),
        ),
        Background(Pattern.PLAIN, Tone.WHITE),
    ),
)


@dataclass
class Second:
    """The second model: a folder whose files are replaced as a person would, by another file of the same name."""

    folder: Path
    others: Path  # a file with other weights of the same architecture
    weights: str = "its own"

    @property
    def source(self) -> Path:
        """Where its weights are from."""
        return BUILT_IN / "model.safetensors" if self.weights == "its own" else self.others

    def make_others(self) -> None:
        weights = load_file(BUILT_IN / "model.safetensors")
        coarser = {name: (value.view(torch.int16) & KEPT_BITS).view(torch.bfloat16) for name, value in weights.items()}
        save_file(coarser, self.others)

    def replace(self, name: str, content: bytes) -> None:
        new = self.folder / name
        partial = new.with_name("being-copied")
        partial.write_bytes(content)
        partial.replace(new)

    def become(self, weights: str) -> None:
        self.weights = weights
        self.replace("model.safetensors", self.source.read_bytes())

    def renew(self) -> None:
        """The same bytes in new files."""
        self.replace("model.safetensors", self.source.read_bytes())
        for name in ("tokenizer.json", "decoder-turbo/decoder_model.safetensors"):
            self.replace(name, (BUILT_IN / name).read_bytes())

    def damage(self) -> None:
        self.replace("model.safetensors", (BUILT_IN / "model.safetensors").read_bytes()[:1_000_000])


@dataclass
class Tally:
    """What has happened so far."""

    first: dict[tuple, str] = field(default_factory=dict)  # what a template gave the first time
    events: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)  # bytes that the server's process holds after each prompt
    open_files: list[int] = field(default_factory=list)


def main() -> None:
    """Queue, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=600, help="stop earlier after so many")
    parser.add_argument("--only", nargs="+", metavar="TEMPLATE", help="of the templates, these alone")
    a = parser.parse_args()
    if (found := installed()) is None:
        parser.error("no ComfyUI was found; set COMFYUI_PATH and COMFYUI_PYTHON")
    templates = a.only or sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as base:
        tally = soak(*found, Path(base), templates, a.prompts, a.seed, 60 * a.minutes)
        left = leftovers(Path(base))
    sys.exit(report(tally, left))


def soak(folder: Path, python: Path, base: Path, templates: list[str], count: int, seed: int, seconds: float) -> Tally:
    """Queue ``count`` prompts, or as many as there is time for."""
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / PACK).symlink_to(ROOT)
    (base / "custom_nodes" / METER.name).symlink_to(METER)
    (base / "tmp").mkdir()
    second = Second(base / "models/llada2" / SECOND, base / "others.safetensors")
    shutil.copytree(BUILT_IN, second.folder, ignore=shutil.ignore_patterns("mlx-*bit", "training"))
    second.make_others()
    rng, tally, end = random.Random(seed), Tally(), time.monotonic() + seconds
    scenes = [SHIPPED, *((text, scene) for scene, text in islice(prompts(VARIANTS - 1), VARIANTS - 1))]
    # as it is started by default, ComfyUI keeps what every node gave until memory is short, and would seem to leak
    with serve(folder, python, base, "--cache-classic", TMPDIR=str(base / "tmp"), **RETURNING) as comfy:
        for number in range(1, count + 1):
            if time.monotonic() > end:
                break
            between(comfy, rng, second, tally)
            once(comfy, rng, second, tally, number, rng.choice(templates), rng.choice(scenes))
            tally.open_files.append(open_files(comfy.process.pid))
            if comfy.process.poll() is not None:
                tally.wrong.append(f"prompt {number}: the server ended:\n{comfy.log()[-3000:]}")
                break
        comfy.post("/free", {"unload_models": True, "free_memory": True})
    return tally


def between(comfy: Comfy, rng: random.Random, second: Second, tally: Tally) -> None:
    """What may happen before a prompt is queued."""
    if rng.random() < 0.08:
        comfy.post("/free", {"unload_models": True, "free_memory": rng.random() < 0.5})
        tally.events["models freed between prompts"] += 1
    if rng.random() < 0.08:
        second.become(rng.choice(["its own", "the others"]))
        tally.events["weights replaced"] += 1
    elif rng.random() < 0.04:
        second.renew()
        tally.events["files replaced by their like"] += 1
    elif rng.random() < 0.03:
        damaged(comfy, second, tally)


def damaged(comfy: Comfy, second: Second, tally: Tally) -> None:
    """A file that is cut short is refused in words, and what takes its place is used."""
    second.damage()
    graph = workflow("text_to_image", **{"1": {"model": SECOND}})
    answer = comfy.post("/prompt", {"prompt": graph, "client_id": comfy.client_id})
    said = json.dumps(answer)
    if "prompt_id" in answer or "truncated or damaged" not in said:
        tally.wrong.append(f"a damaged model was answered with {said[:300]}")
    tally.events["damaged models refused"] += 1
    second.become(second.weights)


def once(
    comfy: Comfy,
    rng: random.Random,
    second: Second,
    tally: Tally,
    number: int,
    name: str,
    asked: tuple[str, Scene],
) -> None:
    """Queue a template, perhaps cancel it or free memory meanwhile, and compare what comes out."""
    model = rng.choices((SHAPES, SECOND), (6, 4))[0]
    precision = rng.choices(("auto", "8bit"), (88, 12))[0]
    weights = second.weights if model == SECOND else "its own"
    graph = changed(workflow(name), model, precision, asked[0], number)
    key = (name, asked[0], weights, precision)
    timers: list[Timer] = []

    def on_event(kind: str, data: dict) -> None:
        if kind == "execution_start":
            for timer in timers:
                timer.start()

    cancelled, what = rng.random() < 0.12, ""
    if cancelled:
        timers.append(Timer(rng.uniform(0, 6), lambda: comfy.post("/interrupt", {})))
        what = "cancelled"
    elif rng.random() < 0.06:
        timers.append(Timer(rng.uniform(0, 4), lambda: comfy.post("/free", {"unload_models": True})))
        what = "models freed meanwhile"
    elif rng.random() < 0.06:
        timers.append(Timer(rng.uniform(0, 4), second.renew))
        what = "files replaced by their like meanwhile"
    began = time.monotonic()
    run = comfy.run(graph, on_event)
    for timer in timers:
        timer.cancel()
        timer.join()
    seconds = time.monotonic() - began
    if cancelled:
        what = "cancelled while it ran" if run.interrupted else "cancelled too late"
    if what:
        tally.events[what] += 1
    tally.events["prompts"] += 1
    tally.events[f"model {model}, {precision}"] += 1
    verdict = "cancelled" if run.interrupted else judge(comfy, run, graph, key, asked[1], tally)
    if verdict.startswith("WRONG"):
        tally.wrong.append(f"prompt {number}, {key}: {verdict}")
    memory = {"resident": 0, "held": 0}
    with suppress(OSError):  # the server ended
        memory = comfy.get("/soak/memory")
    tally.memory.append(memory["held"])
    size = f"{memory['held'] / 1e6:6.0f} of {memory['resident'] / 1e6:.0f} MB"
    print(f"{number:4} {name:28} {model:18} {precision:5} {seconds:5.1f} s {size}  {verdict}  {what}", flush=True)


def changed(graph: dict, model: str, precision: str, text: str, number: int) -> dict:
    """A template with another model and prompt, fewer steps of the decoder, and nothing that is cached from the last time."""
    for node in graph.values():
        inputs = node["inputs"]
        if inputs.get("model") == SHAPES:
            inputs["model"] = model
        if node["class_type"] == "LoadLLaDA2Backbone":
            inputs["precision"] = precision
        if node["class_type"] == "LLaDA2TextToVQ":
            inputs["prompt"] = text
            if not inputs["temperature"]:  # the codes are the same for every seed
                inputs["seed"] = number
        if node["class_type"] in ("LLaDA2TextToVQ", "LLaDA2Edit", "LLaDA2Redraw", "LLaDA2Grow", "KSampler"):
            inputs["steps"] = min(inputs["steps"], 4)
        if "decoder.steps" in inputs:
            inputs["decoder.steps"] = 4
        if "max_new_tokens" in inputs:
            inputs["max_new_tokens"] = min(inputs["max_new_tokens"], 64)
    return graph


def judge(comfy: Comfy, run: Run, graph: dict, key: tuple, scene: Scene, tally: Tally) -> str:
    """Whether what a run gave is right, in words."""
    if run.error:
        return f"WRONG: {run.error.get('exception_type')}: {run.error.get('exception_message')}"
    outputs = {node: output for node, output in run.outputs.items() if output}
    pictures = {
        node: [comfy.base / image["type"] / image["subfolder"] / image["filename"] for image in output["images"]]
        for node, output in outputs.items()
        if "images" in output
    }
    texts = {node: output["text"] for node, output in outputs.items() if "text" in output}
    if not pictures and not texts:
        return "WRONG: there is no result"
    for node in set(pictures) & set(drawn(graph)):
        for path in pictures[node]:
            with Image.open(path) as picture:
                shown = same_layout(picture, scene)
                if key[2:] == ("its own", "auto"):
                    tally.events["pictures read by the detector"] += 1
                    tally.events["of them as their prompt says"] += shown
                    if not shown:
                        print(f"     the detector reads {read(picture)}", flush=True)
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode())
    for node in sorted(pictures):
        for path in pictures[node]:
            with Image.open(path) as picture:
                digest.update(str(picture.size).encode() + picture.tobytes())
    found = digest.hexdigest()
    if key not in tally.first:
        tally.first[key] = found
        return "first"
    tally.events["results equal to the first"] += found == tally.first[key]
    return "equal" if found == tally.first[key] else "WRONG: it is not what the same template gave before"


def drawn(graph: dict) -> Iterator[str]:
    """The nodes that show a picture which was drawn of a prompt alone."""
    for name, node in graph.items():
        way, at = [], node["inputs"].get("images")
        while isinstance(at, list):
            kind = graph[at[0]]["class_type"]
            way.append(kind)
            inputs = graph[at[0]]["inputs"]
            at = inputs.get("samples") or inputs.get("positive") or inputs.get("vq")
        if way[-1:] == ["LLaDA2TextToVQ"] and set(way) <= {
            "ZImageDecode",
            "VAEDecode",
            "KSampler",
            "LLaDA2VQToConditioning",
            "LLaDA2TextToVQ",
        }:
            yield name


def open_files(process: int) -> int:
    """How many files a process has open; 0 where the system does not say."""
    folder = Path(f"/proc/{process}/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


def leftovers(base: Path) -> list[str]:
    """What lies where nothing has to: temporary files, half-written ones and locks. What MLX and PyTorch compile they keep."""
    found = [*(base / "tmp").rglob("*"), *base.rglob("*.partial"), *base.rglob("*.lock"), *base.rglob("being-copied")]
    names = {path.relative_to(base).as_posix() for path in found}
    return sorted(name for name in names if not name.startswith(("tmp/mlx", "tmp/torchinductor")))


def report(tally: Tally, left: list[str]) -> int:
    """Print what was found; returns the exit status."""
    problems = [*tally.wrong, *(f"left behind: {name}" for name in left)]
    print("\n| | |\n|---|---|")
    for what, count in sorted(tally.events.items()):
        print(f"| {what} | {count} |")
    print(f"| combinations of template, prompt, weights and precision | {len(tally.first)} |")
    memory, files = tally.memory, tally.open_files
    for at in range(WARM, len(memory) + 1, WARM):
        about = memory[at - WARM : at]
        print(
            f"| memory, prompts {at - WARM + 1} to {at}: median, most | {statistics.median(about) / 1e6:.0f} MB, {max(about) / 1e6:.0f} MB |"
        )
    if len(memory) >= 3 * WARM:
        early, late = (statistics.median(part) for part in (memory[WARM : 2 * WARM], memory[-WARM:]))
        print(
            f"| memory, the last {WARM} prompts less prompts {WARM + 1} to {2 * WARM}, medians | {(late - early) / 1e6:+.0f} MB |"
        )
        if late - early > ALLOWED:
            problems.append(f"memory grew by {(late - early) / 1e6:.0f} MB")
    if len(files) > WARM:
        print(f"| open files after prompt {WARM}, and at the end | {files[WARM - 1]}, {files[-1]} |")
    print(f"| wrong results | {len(tally.wrong)} |\n| left behind | {len(left)} |")
    for problem in problems:
        print(f"\n{problem}")
    return bool(problems)


if __name__ == "__main__":
    main()
