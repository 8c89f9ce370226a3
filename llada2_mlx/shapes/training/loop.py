"""The loop that every stage of the training shares: seeded, resumable, logged."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ...files import replacing

SAVE_SECONDS = 120
LOG_ROWS = 40  # of each stage in the table


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a stage learns: AdamW, a linear warm-up, then a cosine down to a twentieth."""

    steps: int
    rate: float
    warmup: int = 100
    decay: float = 0.01  # of the weights
    average: float = 0.0  # of the weights' moving average, which is what the stage then gives; 0 for none

    def rate_at(self, step: int) -> float:
        """The learning rate of a step."""
        rest = max(0.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.rate * min(1.0, (step + 1) / self.warmup) * (0.525 + 0.475 * math.cos(math.pi * rest))


def train(
    name: str,
    module: nn.Module,
    losses: Callable[[int, random.Random], dict[str, torch.Tensor]],
    schedule: Schedule,
    folder: Path,
    say: Callable[[str], None] = print,
) -> nn.Module:
    """Train ``module`` and return it; goes on where an earlier call in the same folder stopped.

    Args:
        name: of the stage, and of its files in ``folder``.
        losses: called with the number of the step and its own random numbers; gives what is to be minimised as
            ``loss``, and what is only told. PyTorch's random numbers are seeded for each step as well, so that a
            run that was stopped gives what one that was not gives.
    """
    state_file, log_file = folder / f"{name}.pt", folder / f"{name}.tsv"
    optimiser = torch.optim.AdamW(module.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=schedule.decay)
    averaged = {key: value.clone() for key, value in module.state_dict().items()}
    start, spent = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        module.load_state_dict(state["module"])
        optimiser.load_state_dict(state["optimiser"])
        averaged, start, spent = state["averaged"], state["step"], state["seconds"]
    began, saved, told = time.monotonic() - spent, time.monotonic(), {}
    module.train()
    for step in range(start, schedule.steps):
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate_at(step)
        torch.manual_seed(step)
        values = losses(step, random.Random(f"{name} {step}"))
        optimiser.zero_grad(set_to_none=True)
        values["loss"].backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        _average(averaged, module, min(schedule.average, (step + 1) / (step + 10)))
        for key, value in values.items():
            told.setdefault(key, []).append(float(value.detach()))
        done = step + 1
        if done % max(1, schedule.steps // LOG_ROWS) == 0 or done == schedule.steps:
            means = {key: sum(numbers) / len(numbers) for key, numbers in told.items()}
            told = {}
            _log(log_file, done, time.monotonic() - began, means)
            say(f"{name} {done}/{schedule.steps} " + " ".join(f"{key} {value:.4f}" for key, value in means.items()))
        if time.monotonic() - saved > SAVE_SECONDS or done == schedule.steps:
            seconds, saved = time.monotonic() - began, time.monotonic()
            state = {"module": module.state_dict(), "optimiser": optimiser.state_dict(), "averaged": averaged}
            with replacing(state_file) as partial:
                torch.save(state | {"step": done, "seconds": seconds}, partial)
    if schedule.average:
        module.load_state_dict(averaged)
    return module.eval().requires_grad_(False)


def averaged(names: Sequence[str], module: nn.Module, folder: Path) -> tuple[nn.Module, int]:
    """The module with the mean of what some stages have so far, and after how many steps of the last.

    Raises:
        FileNotFoundError: one of the stages has kept nothing yet.
    """
    states = [torch.load(folder / f"{name}.pt", weights_only=True) for name in names]
    kept = [state["averaged"] for state in states]
    module.load_state_dict({key: sum(each[key] for each in kept) / len(kept) for key in kept[0]})
    return module.eval().requires_grad_(False), states[-1]["step"]


@torch.no_grad()
def _average(averaged: dict[str, torch.Tensor], module: nn.Module, weight: float) -> None:
    for key, value in module.state_dict().items():
        if value.is_floating_point():
            averaged[key].lerp_(value, 1 - weight)
        else:
            averaged[key].copy_(value)


def _log(path: Path, step: int, seconds: float, means: dict[str, float]) -> None:
    rows = path.read_text().splitlines() if path.exists() else ["\t".join(["step", "minutes", *means])]
    columns = rows[0].split("\t")[2:]
    numbers = (f"{means[column]:.4f}" if column in means else "" for column in columns)
    path.write_text("\n".join([*rows, "\t".join([str(step), f"{seconds / 60:.1f}", *numbers])]) + "\n")
