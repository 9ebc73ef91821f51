"""Rows: what it says of each row is what vLLM's own batch holds there, on both runners."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runners import Manager, RunnerV1, RunnerV2, Said, Schedule, run, token, without_a_gpu
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_lora_ext.model_patches.rows import Rows, Span, unknown_rows

RUNNERS = pytest.mark.parametrize("kind", [RunnerV1, RunnerV2])


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    with without_a_gpu():
        yield


class Seen:
    """Takes spans, and compares them with what the model is given when it runs."""

    def __init__(self, kind: Any, seed: int) -> None:
        self.manager = Manager()
        self.manager.rows = self.rows = Rows(self.manager)
        self.runner = kind(self.manager)
        self.schedule = Schedule(np.random.default_rng(seed), kind is RunnerV2)
        self.runner.schedule, self.runner.forward = self.schedule, self.forward
        self.spans: Sequence[Span] = ()
        self.takes = self.forwards = 0
        self.watch = self.rows.watch(
            lambda request: bool(request.sampling_params.extra_args), self.take
        )

    def take(self, spans: Sequence[Span]) -> None:
        self.spans = spans
        self.takes += 1

    def forward(self) -> None:
        self.forwards += 1
        assert self.watch.scheduled == bool(self.spans)
        wanted = {s.key: s for s in self.schedule.running.values() if s.wanted}
        assert [s.request.req_id for s in self.spans] == [
            key for key in self._order() if key in wanted
        ]
        held: set[int] = set()
        for span in self.spans:
            said = wanted[span.request.req_id]
            self._check(span, said)
            held |= set(range(span.start, span.stop))
        others = {said.number for said in self.schedule.running.values() if not said.wanted}
        rest = set(range(len(self.runner.input_ids))) - held
        assert {self.runner.input_ids[row] // 1000 for row in rest} <= others

    def _order(self) -> list[str]:
        numbers = dict.fromkeys(number // 1000 for number in self.runner.input_ids)
        keys = {said.number: said.key for said in self.schedule.running.values()}
        return [keys[number] for number in numbers]

    def _check(self, span: Span, said: Said) -> None:
        ids = [token(said.number, span.at + i) for i in range(span.stop - span.start)]
        assert self.runner.input_ids[span.start : span.stop] == ids
        assert set(self.runner.token_loras[span.start : span.stop]) == {said.lora}
        assert span.slot == self.manager.slot(said.lora)
        assert span.first == (said.steps == 0)
        assert span.request.prompt_token_ids == said.tokens[: said.prompt_len]

    def step(self) -> None:
        before, drawn = self.takes, self.schedule.draw()
        run(self.runner, drawn.scheduled)
        any_wanted = any(self.schedule.by_key(key).wanted for key in drawn.counts)
        assert self.takes - before == (2 if any_wanted else 0)
        assert tuple(self.spans) == () and not self.watch.scheduled
        self.schedule.done(drawn)


@RUNNERS
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_every_row_of_random_schedules(kind: Any, seed: int) -> None:
    seen = Seen(kind, seed)
    for _ in range(25):
        seen.step()
    (watch,) = seen.rows._watches
    alive = {r.key for r in (*seen.schedule.running.values(), *seen.schedule.waiting)}
    alive |= seen.schedule.finished  # the next step says so
    assert set(watch._running) <= alive and watch._new <= alive


@RUNNERS
def test_the_schedules_hold_what_they_should(kind: Any) -> None:
    """Chunks, drafts, requests that go on after a preemption, ids that come again."""
    found = dict.fromkeys(("chunk", "drafts", "resumed", "again", "empty"), 0)
    seen, numbers = Seen(kind, 7), {}
    for _ in range(300):
        drawn = seen.schedule.draw()
        for key, count in drawn.counts.items():
            said = seen.schedule.by_key(key)
            found["chunk"] += said.computed + count < said.prompt_len
            found["drafts"] += key in drawn.drafts
            found["again"] += numbers.setdefault(key, said.number) != said.number
        new = {r.req_id for r in drawn.scheduled.scheduled_new_reqs}
        again = drawn.scheduled.scheduled_cached_reqs.resumed_req_ids
        found["resumed"] += sum(seen.schedule.by_key(k).steps > 0 for k in new | again)
        found["empty"] += not drawn.counts
        run(seen.runner, drawn.scheduled)
        seen.schedule.done(drawn)
    assert seen.forwards > 200 and all(found.values()), found


@RUNNERS
def test_a_dummy_run_and_a_failed_step_have_no_rows(kind: Any) -> None:
    seen = Seen(kind, 3)

    def fail() -> None:
        assert seen.spans
        raise ZeroDivisionError

    seen.runner.forward = fail
    said = Said("r", 1, 4, 1, True, total=4)
    seen.schedule.running["r"] = said
    scheduled = SchedulerOutput.make_empty()
    scheduled.scheduled_new_reqs = [said.data()]
    scheduled.num_scheduled_tokens, scheduled.total_num_scheduled_tokens = {"r": 4}, 4
    with pytest.raises(ZeroDivisionError):
        run(seen.runner, scheduled)
    assert tuple(seen.spans) == ()
    seen.takes = 0
    lora_config: Any = SimpleNamespace(max_loras=2)
    with seen.runner.maybe_select_dummy_loras(lora_config, np.array([3, 3]), num_active_loras=2):
        assert seen.runner.token_loras == (1, 1, 1, 2, 2, 2)
    assert seen.takes == 0


def test_nobody_watches() -> None:
    """Then a step keeps nothing, and asks nothing of the scheduler's output or the batch."""
    rows = Rows(Manager())
    rows.begin_step(None)  # type: ignore[arg-type]
    rows.take_order(None, None)  # type: ignore[arg-type]
    rows.slots_are_set()
    rows.end_step()
    assert rows._order is None


def test_an_engine_without_lora_beside_one_with_it() -> None:
    seen = Seen(RunnerV1, 1)
    del seen.runner.lora_manager
    seen.runner.set_active_loras = lambda *_: None
    seen.runner.forward = lambda: None
    run(seen.runner, seen.schedule.draw().scheduled)
    assert seen.takes == 0


def test_which_rows_logits_are_computed() -> None:
    rows, hidden_TK = Rows(Manager()), torch.randn(12, 4)
    picked_N = torch.tensor([2, 7, 10])
    assert rows.logits_rows(torch.randn(5, 4)) == slice(0, 5)  # a dummy run
    rows.take_sampled(picked_N)
    assert rows.logits_rows(hidden_TK[picked_N]) is picked_N
    rows.end_step()
    whole = hidden_TK[1:]  # as where the hidden states are themselves a part of a buffer
    with rows.logits_of(whole, picked_N):
        assert rows.logits_rows(whole[picked_N]) is picked_N
        assert rows.logits_rows(whole[3:9]) == slice(3, 9)
        assert rows.logits_rows(whole) == slice(0, 11)
        with pytest.raises(RuntimeError, match="not known to be of this step"):
            rows.logits_rows(torch.randn(2, 4))
    with rows.logits_of(whole, None), pytest.raises(RuntimeError, match="not known"):
        rows.logits_rows(whole[3:9].clone())
    assert rows.logits_rows(torch.randn(2, 4)) == slice(0, 2)


@pytest.mark.parametrize("adaptive, dbo", [(True, False), (False, True), (False, False)])
def test_engines_whose_rows_the_host_does_not_know(adaptive: bool, dbo: bool) -> None:
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(enable_adaptive_verification=adaptive),
        parallel_config=SimpleNamespace(use_ubatching=dbo),
    )
    assert bool(unknown_rows(config)) == (adaptive or dbo)
    config.speculative_config = None
    assert bool(unknown_rows(config)) == dbo
