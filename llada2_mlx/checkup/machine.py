"""The machine and the packages, as far as a report needs them. Nothing here names a person, a host or a folder."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

# the packages that compute or read files, as they are installed, in the order in which they are told
PACKAGES = (
    "mlx",
    "mlx-lm",
    "torch",
    "transformers",
    "diffusers",
    "huggingface_hub",
    "safetensors",
    "torchdiffeq",
    "numpy",
)


@dataclass(frozen=True)
class Machine:
    """What there is to compute with.

    Args:
        system: "macOS" or what else the system calls itself; ``release`` is its version.
        architecture: what this Python runs as: "arm64", "x86_64".
        chip: as its maker calls it.
        gpu_cores: of an Apple chip; None where nobody says.
        memory_bytes: of the machine.
        translated: whether this Python is one for Intel on an Apple chip, where there is no MLX.
        python: its version.
    """

    system: str
    release: str
    architecture: str
    chip: str
    gpu_cores: int | None
    memory_bytes: int
    translated: bool
    python: str

    @property
    def is_mac(self) -> bool:
        return self.system == "macOS"


def this_machine() -> Machine:
    """The machine that this runs on; no package is imported for it."""
    mac = platform.system() == "Darwin"
    registry = _answer("ioreg", "-rc", "AGXAccelerator", "-d", "1") if mac else ""
    return Machine(
        "macOS" if mac else platform.system(),
        platform.mac_ver()[0] if mac else platform.release(),
        platform.machine(),
        (_answer("sysctl", "-n", "machdep.cpu.brand_string") if mac else _cpu()) or "unknown",
        gpu_cores(registry),
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        mac and _answer("sysctl", "-n", "sysctl.proc_translated") == "1",
        platform.python_version(),
    )


def gpu_cores(registry: str) -> int | None:
    """How many cores the GPU has, from what ``ioreg`` writes of it."""
    found = re.search(r'"gpu-core-count"\s*=\s*(\d+)', registry)
    return int(found[1]) if found else None


def installed() -> dict[str, str | None]:
    """The version of each of ``PACKAGES``, None where one is not installed; none is imported."""
    versions: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in versions:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _answer(*command: str) -> str:
    """What a command of the system writes; empty where there is none or it fails."""
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return ""


def _cpu() -> str:
    """The processor's name on Linux."""
    with suppress(OSError):
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if names:
            return f"{names[0]}, {os.cpu_count()} threads"
    return platform.processor()
