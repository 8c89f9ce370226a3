"""The command: makes a model, measures, prints tables, and writes the same as JSON."""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import mlx.core as mx

from llada2_mlx.backbone.denoising import Method
from llada2_mlx.backbone.handle import Backbone
from llada2_mlx.backbone.sprint import Sprint
from llada2_mlx.checkpoint.config import PRECISIONS
from llada2_mlx.checkpoint.layout import Checkpoint

from . import breakdown, model, upstream
from .measure import SAMPLING, STEPS, Case, Job, Request, Section, compare, ours, picture, question

_WAYS = {"exact cache": Method.CACHED, "recomputing": Method.RECOMPUTE, "plain way": Method.PLAIN}


def drawing_512(backbone: Backbone, repeats: int) -> Section:
    return _methods("Text to image, 512 x 512", backbone, picture(backbone, 512), _WAYS, repeats)


def drawing_1024(backbone: Backbone, repeats: int) -> Section:
    return _methods("Text to image, 1024 x 1024", backbone, picture(backbone, 1024), _WAYS, repeats)


def understanding(backbone: Backbone, repeats: int) -> Section:
    title = "Understanding, 2,500 codes, an answer of 64 tokens"
    return _methods(title, backbone, question(backbone), _WAYS, repeats)


def sprint(backbone: Backbone, repeats: int) -> Section:
    """With the published number of steps for an answer. Not exact: the tokens part from those of the exact way."""
    sampling, request = replace(SAMPLING, steps=32), question(backbone, length=256)
    ways = {"exact cache": None, "keep 70 %": Sprint(), "keep 30 %": Sprint(keep_ratio=0.3)}
    cases = [
        Case.of(name, backbone, request, lambda request, way=way: ours(request, sprint=way, sampling=sampling))
        for name, way in ways.items()
    ]
    return compare(f"SPRINT, {sampling.steps} steps, 2,500 codes, an answer of 256 tokens", cases, repeats)


def batches(backbone: Backbone, repeats: int) -> Section:
    """Pictures together."""
    counts = (1, 2, 4, 8)
    cases = [
        Case.of(
            f"{count} together",
            backbone,
            picture(backbone, 512),
            lambda request, count=count: ours(request, pictures=count),
        )
        for count in counts
    ]
    section = compare("Pictures together, 512 x 512", cases, repeats)
    section.notes = [
        f"{row.name}: {60 * count / row.seconds:.1f} pictures a minute" for count, row in zip(counts, section.rows)
    ]
    return section


def precisions(backbone: Backbone, repeats: int) -> Section:
    """bf16 against the others."""
    cases, bytes_of = [], {}
    for name in ("bf16", *(name for name in PRECISIONS if name not in ("auto", "bf16"))):
        other = Backbone(backbone.checkpoint, name)
        cases.append(Case.of(name, other, picture(other, 512)))
        bytes_of[name] = other.size
    section = compare("Precisions, text to image, 512 x 512", cases, repeats)
    section.notes = [f"{name}: {size / 1e6:.1f} MB of weights" for name, size in bytes_of.items()]
    section.details = {"weight_bytes": bytes_of}
    return section


def mlx_vlm_codes(backbone: Backbone, repeats: int) -> Section:
    request = picture(backbone, 512, rescale=0.0)  # it has no rescale
    return _against_mlx_vlm("Its code sampler, 512 x 512, no rescale", backbone, request, upstream.codes, repeats)


def mlx_vlm_text(backbone: Backbone, repeats: int) -> Section:
    title = "Its text generation, 2,500 codes, an answer of 64 tokens"
    return _against_mlx_vlm(title, backbone, question(backbone), upstream.text, repeats)


def parts(backbone: Backbone, repeats: int) -> Section:
    request = picture(backbone, 512)
    seconds = breakdown.parts(backbone, request)
    whole = sum(seconds.values())
    notes = [f"{label:24} {value:9.2f} s {value / whole:6.1%}" for label, value in seconds.items()]
    return Section("Where the time goes, text to image, 512 x 512", notes=notes, details={"seconds": seconds})


SECTIONS: dict[str, Callable[[Backbone, int], Section]] = {
    "512": drawing_512,
    "1024": drawing_1024,
    "understand": understanding,
    "sprint": sprint,
    "batches": batches,
    "precisions": precisions,
    "mlx-vlm-codes": mlx_vlm_codes,
    "mlx-vlm-text": mlx_vlm_text,
    "breakdown": parts,
}


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    config = model.SIZES[options.size]
    with tempfile.TemporaryDirectory() as folder:
        backbone = Backbone(Checkpoint(model.write(Path(folder), config)), options.precision)
        print(f"{_machine()}; a random model of {backbone.size / 1e6:.1f} MB, {options.size}, in {backbone.dtype}")
        print(f"{STEPS} steps a block of 32, nothing accepted early, temperature 0; medians of the runs\n", flush=True)
        sections = {}
        for name in options.only:
            section = sections[name] = SECTIONS[name](backbone, options.repeats)
            print("\n".join(_lines(section)), flush=True)
    if options.json:
        about = {"machine": _machine(), "size": options.size, "steps": STEPS, "config": asdict(config)}
        about |= {"mlx": mx.__version__, "mlx_vlm": upstream.version(), "type": str(backbone.dtype)}
        content = about | {"sections": {name: section.as_json() for name, section in sections.items()}}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks", description="Measure generation on a random model.")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="the sections to measure")
    parser.add_argument(
        "--size",
        choices=model.SIZES,
        default="small" if mx.default_device().type == mx.DeviceType.cpu else "mid",
        help="of the model; small on a CPU and mid elsewhere (1.5 GB on disk) unless told",
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "bf16", "float32"),
        default="auto",
        help="of all but the section on precisions; in float32 all ways give equal tokens, in bf16 near-ties fall "
        "differently and a random model has many",
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of a case, fewer where one takes long (3)")
    parser.add_argument("--json", type=Path, help="write everything to this file too")
    return parser.parse_args(arguments)


def _methods(title: str, backbone: Backbone, request: Request, ways: dict[str, Method], repeats: int) -> Section:
    cases = [
        Case.of(name, backbone, request, lambda request, method=method: ours(request, method))
        for name, method in ways.items()
    ]
    return compare(title, cases, repeats)


def _against_mlx_vlm(
    title: str, backbone: Backbone, request: Request, way: Callable[[Request], Job], repeats: int
) -> Section:
    if upstream.version() is None:
        return Section(f"mlx-vlm. {title}", notes=["The package mlx-vlm is not installed; its rows are left out."])
    cases = [Case.of("exact cache", backbone, request), Case.of("mlx-vlm", backbone, request, way)]
    return compare(f"mlx-vlm {upstream.version()}. {title}", cases, repeats)


def _machine() -> str:
    return f"MLX {mx.__version__} on {mx.default_device()}, {platform.system()} {platform.machine()}"


def _lines(section: Section) -> Iterator[str]:
    yield section.title
    if section.rows:
        yield f"  {'':14}{'positions':>11}{'pairs':>13}{'head rows':>13}{'syncs':>7}{'steps':>7}{'seconds':>10}{'CPU s':>10}{'runs':>6}  tokens equal"
    for row in section.rows:
        counts = [
            f"{count:,}" if count else "-" for count in (row.positions, row.pairs, row.head_rows, row.syncs, row.steps)
        ]
        yield (
            f"  {row.name:14}{counts[0]:>11}{counts[1]:>13}{counts[2]:>13}{counts[3]:>7}{counts[4]:>7}"
            f"{row.seconds:>10.2f}{row.cpu_seconds:>10.2f}{len(row.runs):>6}  {row.equal_tokens}"
        )
    yield from (f"  {name}: {ratio:.2f} x" for name, ratio in section.ratios.items())
    yield from (f"  {note}" for note in section.notes)
    yield ""


if __name__ == "__main__":
    main()
