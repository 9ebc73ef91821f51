"""Gates frozen where a prompt ends: which rows take whose, on both runners."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runners import Manager, RunnerV1, RunnerV2, Schedule, run, without_a_gpu

from vllm_lora_ext.kernels.gated_lora import StepMap
from vllm_lora_ext.model_patches.frozen_gates import FrozenGates
from vllm_lora_ext.model_patches.rows import Rows


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    with without_a_gpu():
        yield


class Runs:
    """Every adapter's gates are frozen; a row's exact gate is the number of its token."""

    def __init__(self, kind: Any, seed: int) -> None:
        self.manager = Manager()
        self.manager.rows = Rows(self.manager)
        self.step = StepMap(512)
        self.frozen = FrozenGates(self.manager.rows, self.step)
        self.runner = kind(self.manager)
        self.schedule = Schedule(np.random.default_rng(seed), kind is RunnerV2)
        self.runner.schedule, self.runner.forward = self.schedule, self.forward

    def forward(self) -> None:
        ids = self.runner.input_ids
        by_number = {said.number: said for said in self.schedule.running.values()}
        rows = [(row, by_number[i // 1000], i % 1000) for row, i in enumerate(ids)]
        rows = [(row, said, at) for row, said, at in rows if said.lora]
        slots = {self.manager.slot(said.lora) for _, said, _ in rows}
        behind = bool(rows) and all(at >= said.prompt_len for _, said, at in rows)
        assert self.frozen.known(slots) == behind, "one pass where nothing of a prompt is computed"
        self.step.rows_TC.fill_(float("nan"))
        if not behind:
            for row, i in enumerate(ids):
                self.step.rows_TC[row, :2] = i
            for slot in slots:
                self.frozen.keep(slot, 2)
        self.frozen.fill(slots)
        for row, said, at in rows:
            want = 1000 * said.number + min(at, said.prompt_len - 1)
            assert self.step.rows_TC[row, :2].tolist() == [want, want]


@pytest.mark.parametrize("kind", [RunnerV1, RunnerV2])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_every_row_of_random_schedules(kind: Any, seed: int) -> None:
    """Chunks, preemptions after which the end of a prompt is cached, ids that come again."""
    runs = Runs(kind, seed)
    for _ in range(25):
        drawn = runs.schedule.draw()
        run(runs.runner, drawn.scheduled)
        runs.schedule.done(drawn)
    assert len(runs.frozen._kept) <= 8, "nothing is kept of requests that are done"
