"""MLX's own thread: what a run leaves behind, and what it makes Metal keep."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from synthetic import tiny

from llada2_mlx import tasks
from llada2_mlx.backbone.handle import Backbone
from llada2_mlx.checkpoint.layout import Checkpoint
from llada2_mlx.progress import Progress
from llada2_mlx.worker import MLXWorker


class Metal:
    """Stands in for what a Mac says and is told: there is none here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, recommended: int):
        self.limit, self.set = 7, []  # 7 is what somebody else has set before
        monkeypatch.setattr(mx.metal, "is_available", lambda: True)
        monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": recommended})
        monkeypatch.setattr(mx, "set_wired_limit", self.set_wired_limit)

    def set_wired_limit(self, limit: int) -> int:
        before, self.limit = self.limit, limit
        self.set.append(limit)
        return before


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    backbone = Backbone(Checkpoint(tiny()), "float32")
    backbone.load()
    return backbone


@pytest.mark.parametrize("recommended", [10**12, 10**6])
def test_the_wired_limit_is_what_a_run_needs_and_metal_recommends(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, recommended: int
) -> None:
    metal, during = Metal(monkeypatch, recommended), []
    tasks.text_to_vq(backbone, "a cat", on_step=lambda progress: during.append(metal.limit))
    assert set(during) == {min(backbone.size + backbone.working.size, recommended)}
    assert metal.limit == 7 and len(metal.set) == 2


def test_the_wired_limit_is_restored_when_a_run_fails(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    metal = Metal(monkeypatch, 10**12)

    def cancel(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tasks.text_to_vq(backbone, "a cat", on_step=cancel)
    assert metal.limit == 7 and len(metal.set) == 2


def test_no_wired_limit_where_there_is_no_metal(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    if mx.metal.is_available():
        pytest.skip("this machine has Metal")
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: pytest.fail("the limit was set"))
    tasks.text_to_vq(backbone, "a cat")


def test_work_leaves_nothing_in_the_buffer_cache() -> None:
    def job():
        for step in range(3):
            mx.eval(mx.random.normal((1000, 1000), key=mx.random.key(step)) * 2)
            yield Progress("computing", step + 1, 3)

    MLXWorker().drive(job(), lambda progress: None)
    assert mx.get_cache_memory() == 0


def test_reading_and_running_leave_nothing_in_the_buffer_cache(tmp_path: Path) -> None:
    backbone = Backbone(Checkpoint(tiny()), "float32")
    backbone.load()
    assert mx.get_cache_memory() == 0
    tasks.text_to_vq(backbone, "a cat")
    assert mx.get_cache_memory() == 0
