"""The planner of benchmarks/fleet_sim.py: queues, caches and placement do what they say."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "fleet_sim.py"
EVEN = {1: 0.01, 8: 0.01, 32: 0.01}  # a step lasts as long whoever is in it


@pytest.fixture
def sim() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("fleet_sim", SCRIPT)
    module = sys.modules["fleet_sim"] = importlib.util.module_from_spec(spec)  # for dataclasses
    spec.loader.exec_module(module)
    yield module
    del sys.modules["fleet_sim"]


def does(sim: Any, **changes: float) -> Any:
    values = {"prefill_s": 0.0, "load_s": 0.0, "adapter_mb": 2.0, "swap_s": 0.0} | changes
    return sim.Measured(tuple(EVEN.items()), **values)


def test_steps_between_the_measured_ones(sim: Any) -> None:
    one = sim.Measured(((1, 0.01), (8, 0.024), (32, 0.048)), 0.001, 0.1, 1.0, 0.0)
    assert one.step_s(1) == pytest.approx(0.01) and one.step_s(8) == pytest.approx(0.024)
    assert one.step_s(20) == pytest.approx(0.036)
    assert one.capacity == pytest.approx(32 / (16 * 0.048 + 32 * 16 * 0.001))


def test_a_request_alone_takes_its_load_its_prompt_and_a_step(sim: Any) -> None:
    server = sim.Server(0, does(sim, load_s=1.0, prefill_s=0.001, swap_s=0.5), 4)
    assert not server.accept(7, 0.0)
    server.advance(10)
    assert server.first == [pytest.approx(1.0 + 0.016 + 0.01, abs=1e-6)]
    assert server.accept(7, 10.0)  # now it is there
    server.advance(20)
    assert server.first[1] == pytest.approx(0.026, abs=1e-6)
    assert server.busy == 0


def test_a_ninth_adapter_waits_for_a_slot(sim: Any) -> None:
    server = sim.Server(0, does(sim), 100, room=8)
    for adapter in range(9):
        server.accept(adapter, 0.0)
    server.accept(0, 0.0)  # of one that is in the step
    assert len(server.running) == 9 and len(server.waiting) == 1
    server.advance(10)
    assert len(server.first) == 10
    assert max(server.first) == pytest.approx(sim.ANSWER * 0.01 + 0.01, abs=1e-6)


def test_the_longest_unused_adapter_is_forgotten(sim: Any) -> None:
    server = sim.Server(0, does(sim), 2)
    hits = [server.accept(adapter, float(i)) for i, adapter in enumerate((1, 2, 1, 3, 1, 2))]
    assert hits == [False, False, True, False, True, False]


@pytest.mark.parametrize("policy", ["hash", "ring", "ring, 2 copies", "least loaded", "affine"])
def test_everything_is_served_and_what_fits_is_found(sim: Any, policy: str) -> None:
    names, times = sim.draw_requests(40, 1.0, 3000, 100.0, 1)
    row = sim.simulate(does(sim, load_s=0.01), policy, 4, names, times, held=40)
    assert row["hit_rate"] > (0.9 if policy == "least loaded" else 0.98)
    assert 0 < row["ttft_p50_ms"] <= row["ttft_p99_ms"]
    rare = sim.simulate(does(sim, load_s=0.01), policy, 4, names, times, held=3)
    assert rare["hit_rate"] < row["hit_rate"]
    assert rare["moved_mb_per_s"] > row["moved_mb_per_s"]


def test_a_ring_moves_little_when_a_server_leaves(sim: Any) -> None:
    adapters = np.arange(2000)
    assert sim.moved_when_one_leaves("hash", 10, adapters) > 0.8
    assert 0.04 < sim.moved_when_one_leaves("ring", 10, adapters) < 0.2
    assert sim.moved_when_one_leaves("least loaded", 10, adapters) is None
    ring = sim.Ring(range(10))
    assert len(set(ring.following(5, 3))) == 3 and ring.following(5, 99)[:3] == ring.following(5, 3)
