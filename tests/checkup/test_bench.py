"""The benchmark that a person runs: every stage, and the same figures in Markdown and JSON."""

from __future__ import annotations

import io
import json
import re
import shutil
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic import tiny

from llada2_mlx import __version__, cli
from llada2_mlx.checkup import bench
from llada2_mlx.checkup.bench import Clock, Figures, Stage, to_markdown
from llada2_mlx.checkup.machine import this_machine
from llada2_mlx.progress import Progress


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    """What the command wrote into a file, and what it printed."""
    path = tmp_path_factory.mktemp("bench") / "figures.json"
    words = ["--decoder", "full", "--decoder-steps", "4", "--guidance-end", "0.5", "--runs", "2", "--json", str(path)]
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert cli.main(["bench", "--model", str(tiny()), *words]) == 0
    return json.loads(path.read_text()), printed.getvalue()


def test_every_stage_is_measured(found: tuple[dict, str]) -> None:
    figures, _ = found
    stages = {stage["name"]: stage for stage in figures["stages"]}
    assert list(stages) == ["encode", "draw", "understand", "decode", "pixels"]
    for stage in stages.values():
        assert 1 <= len(stage["runs"]) <= 2 and min(stage["runs"]) > 0  # one alone where the machine is busy
        assert min(stage["runs"]) <= stage["seconds"] <= max(stage["runs"])
        assert stage["torch_peak"] is None  # nothing counts it on a CPU
    # 64 codes after a prompt, in both branches, and the prompt
    draw, ask = stages["draw"], stages["understand"]
    assert draw["steps"] <= 8 * 3 and draw["positions"] >= draw["steps"] * 2 * 32
    assert 0 < draw["step_seconds"] < draw["seconds"]
    assert ask["positions"] > 256 and ask["loading"] is None and draw["loading"] > 0
    assert min(draw["mlx_peak"], ask["mlx_peak"]) > figures["weight_bytes"]
    # three intervals, of which those that begin before time 0.5 are guided: shifted to 0, 1/13 and 1/4
    assert stages["decode"]["steps"] == 6
    assert stages["decode"]["engine"] == "torch" and stages["decode"]["what"].startswith("decoder in PyTorch, 4 steps")
    assert [stage["engine"] for stage in figures["stages"] if stage["name"] != "decode"] == [None] * 4
    assert figures["process_peak"] > 10**8


def test_the_decoder_is_measured_in_the_engine_that_is_asked_for(tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny(), tmp_path / "model"))
    path = tmp_path / "figures.json"
    with redirect_stdout(io.StringIO()) as printed:
        words = ["--engine", "mlx-8bit", "--runs", "1", "--size", "256", "--decoder-steps", "3", "--json", str(path)]
        assert cli.main(["bench", "--model", str(model), *words]) == 0
    decode = json.loads(path.read_text())["stages"][3]
    assert (decode["name"], decode["engine"], decode["torch_peak"]) == ("decode", "mlx-8bit", None)
    assert decode["mlx_peak"] > 0 and "turbo decoder in MLX with 8 bits, 3 steps" in printed.getvalue()
    assert (model / "decoder-turbo/mlx-8bit").is_dir()


def test_what_is_reported_names_the_machine_and_no_folder(found: tuple[dict, str]) -> None:
    figures, told = found
    assert figures["machine"]["chip"] in told and figures["version"] == __version__
    assert (figures["model"], figures["mlx_device"], figures["torch_device"]) == (tiny().name, "CPU", "cpu")
    assert f"torch {figures['packages']['torch']}" in told
    assert str(tiny().parent) not in told + json.dumps(figures) and str(Path.home()) not in told + json.dumps(figures)


def test_the_markdown_has_the_figures_of_the_json(found: tuple[dict, str]) -> None:
    figures, told = found
    rows = [re.split(r" *\| *", line)[1:-1] for line in told.splitlines() if line.startswith("|")]
    assert [row[0] for row in rows] == ["stage", "---", *(stage["name"] for stage in figures["stages"])]
    assert {len(row) for row in rows} == {8}
    for row, stage in zip(rows[2:], figures["stages"], strict=True):
        assert row[1:3] == [stage["what"], f"{stage['seconds']:.2f}"]
        assert row[4] == ("" if stage["steps"] is None else str(stage["steps"]))


def test_peaks_of_a_gpu_are_told() -> None:
    stage = Stage("decode", "pixels", 2.0, [2.0], 1.0, 7, 0.25, torch_peak=12_300_000_000)
    figures = Figures(
        "a model", "4bit", 9_700_000_000, "GPU", "mps", replace(this_machine(), gpu_cores=20), {}, [stage]
    )
    told = to_markdown(figures)
    assert "20 GPU cores" in told and "4bit (9.7 GB)" in told
    assert "| decode | pixels | 2.00 | 1.0 s | 7 | 0.250 |  | 12.3 GB |" in told


def test_what_takes_long_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    run = lambda runs: len(bench._repeated(lambda: calls.append(1), runs)[1])
    assert [run(1), run(3)] == [1, 3] and len(calls) == 4
    monkeypatch.setattr(bench, "PATIENCE", 0.0)
    assert run(3) == 1


def test_the_clock_counts_steps_and_passes_them_on() -> None:
    told, sizes = [], iter([3, 9, 5])
    clock = Clock(told.append, lambda: next(sizes))
    steps = [Progress("reading", 1, 1), Progress("denoising", 1, 2), Progress("denoising", 2, 2)]
    for step in steps:
        clock(step)
    assert told == steps and clock.most == 9
    assert [len(seconds) for seconds in clock.steps.values()] == [1, 2]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--size", "100"), "multiples of 32"),
        (("--json", "figures.txt"), "has to end in .json"),
        (("--decoder-steps", "1"), "steps is 1"),
        (("--model", "no/such/folder"), "There is no model folder"),
    ],
)
def test_what_cannot_be_measured(words: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--model", str(tiny()), *words]) == 1
    assert sentence in capsys.readouterr().err
