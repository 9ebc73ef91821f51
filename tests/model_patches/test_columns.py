"""The numbers that come with each row are those of its request and position, on both runners."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runners import Manager, RunnerV1, RunnerV2, Said, Schedule, run, token, without_a_gpu

from vllm_lora_ext.conditions.column import Column, Prompt, values
from vllm_lora_ext.kernels.gated_lora import StepMap
from vllm_lora_ext.model_patches import plan
from vllm_lora_ext.model_patches.columns import RowColumns
from vllm_lora_ext.model_patches.rows import Rows

RUNNERS = pytest.mark.parametrize("kind", [RunnerV1, RunnerV2])


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    with without_a_gpu():
        yield


def columns_of(said: Said) -> tuple[Column, ...]:
    """Some for each request of its own, as many as the adapter of its number has."""
    start = said.number % 7
    stop = max(start, said.prompt_len + 3)
    late = Column(spans=((start, stop), (stop + 2, None)))
    called = Column(scale=0.5, invocation=tuple(token(said.number, start + i) for i in (0, 1)))
    return (late, called, Column(scale=float(said.number)))[: 1 + said.number % 3]


class Conditioned(Said):
    """A request that carries a plan, if it is wanted."""

    def data(self) -> Any:
        made = super().data()
        made.sampling_params.extra_args = None
        if self.wanted:
            plan.attach(made, columns_of(self))
        return made


class Runs:
    def __init__(self, kind: Any, seed: int, monkeypatch: Any = None) -> None:
        self.manager = Manager()
        self.manager.rows = Rows(self.manager)
        self.step = StepMap(512)
        self.calls = 0
        set_rows = self.step.set_rows

        def counted(*args: Any) -> None:
            self.calls += 1
            set_rows(*args)

        self.step.set_rows = counted  # type: ignore[method-assign]
        RowColumns(self.manager.rows, self.step, 64)
        self.runner = kind(self.manager)
        self.schedule = Schedule(np.random.default_rng(seed), kind is RunnerV2)
        self.runner.schedule, self.runner.forward = self.schedule, self.forward

    def forward(self) -> None:
        by_number = {said.number: said for said in self.schedule.running.values()}
        for row, number in enumerate(self.runner.input_ids):
            said, at = by_number[number // 1000], number % 1000
            if said.wanted:
                want = values(columns_of(said), self._prompt(said), at, at + 1)
                got = self.step.rows_TC[row, : want.shape[1]].numpy()
                np.testing.assert_array_equal(got, want[0])

    @staticmethod
    def _prompt(said: Said) -> Prompt:
        return Prompt(said.prompt_len, said.tokens[: said.prompt_len], {})


@RUNNERS
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_every_row_of_random_schedules(kind: Any, seed: int) -> None:
    """Chunks, drafts, preemptions, batches that other requests share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runners.Said", Conditioned)
        runs = Runs(kind, seed)
        for _ in range(25):
            drawn = runs.schedule.draw()
            before = runs.calls
            run(runs.runner, drawn.scheduled)
            said = [runs.schedule.by_key(key).wanted for key in drawn.counts]
            assert runs.calls - before == any(said), "nothing where no request says anything"
            runs.schedule.done(drawn)
