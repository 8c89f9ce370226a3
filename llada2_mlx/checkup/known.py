"""What is known of versions of packages: the lowest that work, and what is wrong with some on some machines.

Read in the public record of each project, not found here, where nothing runs on a Mac. Each entry names its source.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .machine import Machine

# what ``pyproject.toml`` asks for
LOWEST = {
    "mlx": "0.32.4",
    "mlx-lm": "0.32.2",
    "torch": "2.11",
    "transformers": "5.9",
    "diffusers": "0.37",
    "huggingface_hub": "1.27",
    "safetensors": "0.5",
    "torchdiffeq": "0.2.5",
    "numpy": "1.26",
}
LOWEST_MACOS = "14"  # of MLX's wheels


@dataclass(frozen=True)
class Known:
    """A fault of a package on some Macs.

    Args:
        what: a sentence for a person: what happens, and what to do.
        source: where it is on record.
        below: the first version without it; None where there is none.
        macos: the first macOS with it; chip: how the names of the chips begin that have it, None for all.
    """

    package: str
    what: str
    source: str
    below: str | None = None
    macos: str | None = None
    chip: str | None = None

    def holds(self, machine: Machine, version: str) -> bool:
        """Whether it does on this machine with this version."""
        return (
            machine.is_mac
            and (self.below is None or older(version, self.below))
            and (self.macos is None or not older(machine.release, self.macos))
            and (self.chip is None or machine.chip.startswith(self.chip))
        )


FAULTS = (
    Known(
        "torch",
        "On MPS it writes all attention scores into memory, so that the decoder is slower and needs up to 5 GB more. Update to 2.13.",
        "pytorch/pytorch#181575",
        below="2.13",
    ),
    Known(
        "torch",
        "On macOS 27 diffusion models gave damaged pictures on MPS. Update to 2.13.",
        "pytorch/pytorch#187280",
        below="2.13",
        macos="27",
    ),
    Known(
        "mlx",
        "On M5 the experts of a model with few bits can come out wrong. Update to 0.32.4.",
        "ml-explore/mlx#3887, #3856",
        below="0.32.4",
        macos="26.2",
        chip="Apple M5",
    ),
    Known(
        "mlx",
        "On M5 float32 is computed with about 10 bits unless MLX_ENABLE_TF32=0 is set, so that the precision "
        "float32 is not exact.",
        "ml-explore/mlx#3860",
        macos="26.2",
        chip="Apple M5",
    ),
)


def doubts(machine: Machine, versions: Mapping[str, str | None]) -> dict[str, list[str]]:
    """What is to be said of each package: that it is missing or too old, or what is known to be wrong with it here."""
    said: dict[str, list[str]] = {name: [] for name in versions}
    for name, version in versions.items():
        if version is None:
            said[name].append("It is not installed. Install requirements.txt into this Python.")
        elif older(version, LOWEST[name]):
            said[name].append(f"It is older than {LOWEST[name]}, the lowest version that works. Update it.")
    for fault in FAULTS:
        if (version := versions.get(fault.package)) and fault.holds(machine, version):
            said[fault.package].append(f"{fault.what} ({fault.source})")
    return said


def doubts_of(machine: Machine) -> list[str]:
    """What is to be said of the machine itself."""
    said = []
    if machine.translated:
        said.append(
            "This Python is one for Intel and runs translated, where there is no MLX. Install one for Apple silicon (arm64)."
        )
    elif machine.is_mac and machine.architecture != "arm64":
        said.append("This is a Mac with an Intel processor, for which there is no MLX.")
    if machine.is_mac and older(machine.release, LOWEST_MACOS):
        said.append(
            f"macOS {machine.release} is older than {LOWEST_MACOS}, the lowest for which there is MLX. Update it."
        )
    return said


def older(version: str, than: str) -> bool:
    """Whether a version is below another, by their numbers; what follows them ("+cpu", "rc1") does not count."""
    own, other = _numbers(version), _numbers(than)
    length = max(len(own), len(other))
    return own + [0] * (length - len(own)) < other + [0] * (length - len(other))


def _numbers(version: str) -> list[int]:
    found = re.match(r"\d+(\.\d+)*", version)
    return [int(part) for part in found[0].split(".")] if found else []
