"""What is said of machines and versions that are not at hand."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from llada2_mlx.checkup.known import LOWEST, doubts, doubts_of, older
from llada2_mlx.checkup.machine import Machine, gpu_cores, installed, this_machine

M4 = Machine("macOS", "26.3", "arm64", "Apple M4 Pro", 20, 64 * 2**30, False, "3.12.1")
M5 = replace(M4, chip="Apple M5 Max")
LINUX = replace(M4, system="Linux", release="6.1", architecture="x86_64", chip="a processor", gpu_cores=None)
NEW = {**LOWEST, "torch": "2.13.0", "mlx": "0.32.4"}


def said(machine: Machine, **versions: str) -> str:
    return " ".join(sentence for each in doubts(machine, {**NEW, **versions}).values() for sentence in each)


def test_new_packages_on_older_chips_raise_no_doubt() -> None:
    assert said(M4) == said(LINUX) == said(LINUX, torch="2.12.1+cpu") == ""


@pytest.mark.parametrize(
    ("machine", "versions", "sentence"),
    [
        (M4, {"torch": "2.12.1"}, "attention scores"),
        (replace(M4, release="27.0"), {"torch": "2.11.0"}, "damaged pictures"),
        (M5, {}, "MLX_ENABLE_TF32=0"),
        (M5, {"mlx": "0.32.2"}, "few bits can come out wrong"),
        (LINUX, {"transformers": "4.57.1"}, "older than 5.9"),
        (M4, {"huggingface_hub": "0.36"}, "older than 1.27"),
    ],
)
def test_what_is_known(machine: Machine, versions: dict[str, str], sentence: str) -> None:
    assert sentence in said(machine, **versions)


def test_what_does_not_hold_is_not_said() -> None:
    assert "damaged pictures" not in said(replace(M4, release="26.7"), torch="2.11.0")
    assert "damaged pictures" not in said(replace(M4, release="27.0"), torch="2.13.0")
    assert said(replace(M5, release="26.1")) == ""  # the system does not use the new units yet
    assert "few bits" not in said(M4, mlx="0.32.2")


def test_a_missing_package() -> None:
    assert "not installed" in doubts(M4, {**NEW, "diffusers": None})["diffusers"][0]


def test_machines_without_mlx() -> None:
    assert doubts_of(M4) == doubts_of(LINUX) == []
    assert "Intel" in doubts_of(replace(M4, translated=True, architecture="x86_64"))[0]
    assert "Intel" in doubts_of(replace(M4, architecture="x86_64"))[0]
    assert "macOS 13.6 is older than 14" in doubts_of(replace(M4, release="13.6"))[0]


@pytest.mark.parametrize(
    ("version", "than", "answer"),
    [
        ("2.9", "2.13", True),
        ("2.13.0+cpu", "2.13", False),
        ("2.13", "2.13.0", False),
        ("2.12.0.dev20260318", "2.12.1", True),
        ("5.0.0rc1", "5", False),
    ],
)
def test_versions_are_compared_by_their_numbers(version: str, than: str, answer: bool) -> None:
    assert older(version, than) is answer


def test_the_lowest_versions_are_those_of_the_project() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    asked = dict(re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", line).groups() for line in project["dependencies"])
    assert LOWEST == {name: asked[name] for name in LOWEST}


def test_this_machine() -> None:
    machine = this_machine()
    assert machine.memory_bytes > 10**9 and machine.chip and machine.release
    assert set(installed()) == set(LOWEST) and None not in installed().values()


def test_the_cores_of_an_apple_gpu() -> None:
    assert (
        gpu_cores('+-o AGXAcceleratorG16X\n    {\n      "model" = "Apple M4 Pro"\n      "gpu-core-count" = 20\n') == 20
    )
    assert gpu_cores("") is None
