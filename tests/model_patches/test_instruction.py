"""Gates of instructions: pooled from a model's rows on the worker, asked for once by the core."""

from __future__ import annotations

import base64
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

from tests.make_adapters import FIXTURES
from vllm_lora_ext.adapters import load_adapter
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches import gate_pass, instruction
from vllm_lora_ext.model_patches.gate_pass import GatePasses
from vllm_lora_ext.model_patches.instruction import MARK, InstructionPass
from vllm_lora_ext.model_patches.rows import Span

TEMPLATE = load_adapter(FIXTURES / "conditioned/wavllm-a/adapter", head_size=32).template
HIDDEN, LENGTH = 64, 11


class Norm(torch.nn.Module):
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return x + residual


class Model(torch.nn.Module):
    """The end of a model: its last layer leaves one half of each state to be added."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.model.norm = Norm()
        self.skipped: list[bool] = []

    def forward(self, hidden_TK: torch.Tensor) -> torch.Tensor:
        self.skipped.append(get_forward_context().skip_compiled)
        part = torch.rand_like(hidden_TK)
        return self.model.norm(hidden_TK - part, part)


class Worker:
    """Steps of a worker's model, whose rows are said to `InstructionPass` as `Rows` would."""

    def __init__(self) -> None:
        self.model, self.held = Model(), {7: TEMPLATE}
        rows: Any = SimpleNamespace(watch=self._watch, instruction=None, in_first_pass=False)
        self.found = InstructionPass(rows, self.model, self.held.get)
        assert rows.instruction is self.found

    def _watch(self, wants: Any, take: Any) -> Any:
        self.wants, self.take = wants, take
        return SimpleNamespace(scheduled=False)

    def step(self, hidden_TK: torch.Tensor, *spans: Span) -> None:
        context: Any = SimpleNamespace(skip_compiled=False)
        with override_forward_context(context):
            if spans:
                self.take(spans)
            self.model(hidden_TK)
            if spans:
                self.take(())


def request(name: str = "r", lora_id: int = 7, length: int = LENGTH) -> Any:
    params = SimpleNamespace(extra_args={MARK: lora_id})
    return SimpleNamespace(req_id=name, sampling_params=params, prompt_token_ids=[5] * length)


def states(length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randn(length, HIDDEN, generator=torch.Generator().manual_seed(seed))


def gate_of(hidden_TK: torch.Tensor) -> torch.Tensor:
    pooling = TEMPLATE.pooling()
    pooling.add(hidden_TK)
    return pooling.gate()


def same(text: str | None, want: torch.Tensor) -> None:
    assert text is not None
    got = torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").copy())
    assert (got - want).abs().max() < 1e-5


@pytest.mark.parametrize("cuts", [(LENGTH,), (4, 4, 3), (1,) * LENGTH])
def test_the_gate_is_that_of_the_whole_instruction(cuts: tuple[int, ...]) -> None:
    worker, asked, hidden_TK, at = Worker(), request(), states(), 0
    for size in cuts:
        # Other rows before and behind, and rows that pad the step.
        others = torch.full((3, HIDDEN), 1e3)
        rows = torch.cat([others, hidden_TK[at : at + size], others])
        worker.step(rows, Span(asked, 3, 3 + size, at, -1, at == 0))
        at += size
    same(worker.found.finish("r"), gate_of(hidden_TK))
    with pytest.raises(AdapterError):  # once
        worker.found.finish("r")


def test_two_at_once_and_rows_behind_the_instruction() -> None:
    worker, a, b = Worker(), states(seed=1), states(seed=2)
    rows = torch.cat([a, b, torch.ones(2, HIDDEN)])
    worker.step(rows, Span(request("a"), 0, LENGTH, 0, -1, True),
                Span(request("b"), LENGTH, 2 * LENGTH + 2, 0, -1, True))  # fmt: skip
    same(worker.found.finish("b"), gate_of(b))
    same(worker.found.finish("a"), gate_of(a))


def test_a_preempted_instruction_begins_anew() -> None:
    worker, asked, hidden_TK = Worker(), request(), states()
    worker.step(hidden_TK[:6], Span(asked, 0, 6, 0, -1, True))
    for at, stop in ((0, 8), (8, LENGTH)):
        rows = hidden_TK[at:stop]
        worker.step(rows, Span(asked, 0, stop - at, at, -1, False))
    same(worker.found.finish("r"), gate_of(hidden_TK))


def test_a_part_that_nobody_computed_is_missed() -> None:
    worker, asked, hidden_TK = Worker(), request(), states()
    worker.step(hidden_TK[4:], Span(asked, 0, LENGTH - 4, 4, -1, True))
    with pytest.raises(AdapterError, match="none"):
        worker.found.finish("r")
    worker.held.clear()  # the adapter is gone
    worker.step(hidden_TK, Span(asked, 0, LENGTH, 0, -1, True))
    with pytest.raises(AdapterError) as caught:
        worker.found.finish("r")
    assert caught.value.code == "load_failed"


def test_only_steps_with_its_rows_leave_the_compiled_model() -> None:
    worker = Worker()
    worker.step(states())
    worker.step(states(), Span(request(), 0, LENGTH, 0, -1, True))
    worker.step(states())
    assert worker.model.skipped == [False, True, False]


@pytest.mark.parametrize("scheduled", [False, True])
def test_both_runners_run_such_steps_eagerly(scheduled: bool) -> None:
    rows = SimpleNamespace(instruction=SimpleNamespace(scheduled=scheduled))
    manager = SimpleNamespace(_adapter_manager=SimpleNamespace(rows=rows))
    runner, asked = SimpleNamespace(lora_manager=manager), []
    v1 = instruction._eager_v1(lambda self, **kwargs: asked.append(kwargs))
    v1(runner, num_tokens=3)
    dispatch = instruction._dispatching(lambda **kwargs: asked.append(kwargs))
    v2 = instruction._flagging(lambda self: dispatch(need_eager=False))
    v2(runner)
    dispatch(need_eager=False)  # of another engine, or a dummy run
    v2(SimpleNamespace(lora_manager=None))
    eager = [call.get("force_eager", call.get("need_eager", False)) for call in asked]
    assert eager == [scheduled, scheduled, False, False]


def test_a_model_whose_norm_is_not_known() -> None:
    rows: Any = SimpleNamespace(watch=lambda *_: None, instruction=None)
    with pytest.raises(AdapterError) as caught:
        InstructionPass(rows, torch.nn.Linear(1, 1), {}.get)
    assert caught.value.code == "unsupported_feature" and rows.instruction is None


class Core:
    """What `GatePasses` uses of an engine core; its workers answer with the ids they were sent."""

    def __init__(self) -> None:
        model = SimpleNamespace(
            runner_type="generate", max_model_len=20, get_vocab_size=lambda: 100
        )
        self.vllm_config = SimpleNamespace(model_config=model)
        self.scheduler = SimpleNamespace(requests={})
        self.sent: list[Any] = []
        self.gates = GatePasses(self, self.rpc)

    def rpc(self, method: str, request_id: str) -> list[Any]:
        assert method == gate_pass.FINISH
        ids = next(r.prompt_token_ids for r in self.sent if r.request_id == request_id)
        return [{"gate": None}, {"gate": str(ids)}]

    def preprocess_add_request(self, request: Any) -> tuple[Any, int]:
        assert request.sampling_params.skip_reading_prefix_cache and request.lora_request is None
        return request, 0

    def add_request(self, request: Any, wave: int) -> None:
        self.sent.append(request)
        self.scheduler.requests[request.request_id] = request

    def finish(self, *others: str, reason: FinishReason = FinishReason.LENGTH) -> list[str]:
        """A step that ends all that was sent; the outputs that are left."""
        names = [*self.scheduler.requests, *others]
        self.scheduler.requests.clear()
        outputs = EngineCoreOutputs(
            outputs=[EngineCoreOutput(name, [1], finish_reason=reason) for name in names],
            finished_requests=set(names),
        )
        self.gates.take({0: outputs})
        assert outputs.finished_requests == set(others)
        return [output.request_id for output in outputs.outputs]


def test_an_instruction_is_computed_once() -> None:
    core = Core()
    first, again = core.gates.ask(7, "v", [1, 2]), core.gates.ask(7, "v", [1, 2])
    other = core.gates.ask(7, "w", [1, 2])  # of other content
    assert len(core.sent) == 2 and core.gates.pending and not first.done()
    assert core.finish("mine") == ["mine"]
    assert first.result() == {"gate": "[1, 2]", "computed": True}
    assert again.result() == {"gate": "[1, 2]", "computed": False}
    assert other.result()["computed"] and not core.gates.pending
    assert core.gates.ask(7, "v", [1, 2]).result() == {"gate": "[1, 2]", "computed": False}
    assert len(core.sent) == 2


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_pass, "_REMEMBERED", 2)
    core = Core()
    for i in (1, 2, 1, 3, 1):
        core.gates.ask(7, "v", [i])
        core.finish()
    assert [r.prompt_token_ids for r in core.sent] == [[1], [2], [3]]
    core.gates.ask(7, "v", [2])
    assert len(core.sent) == 4


def test_one_that_is_called_off_is_an_error_and_not_remembered() -> None:
    core = Core()
    aborted = core.gates.ask(7, "v", [1])
    core.finish(reason=FinishReason.ABORT)
    vanished = core.gates.ask(7, "v", [2])
    core.scheduler.requests.clear()  # without a word, as a pause of the engine does
    core.gates.take(None)
    for answer in (aborted, vanished):
        assert "[lora_ext:cancelled]" in answer.result()["error"]
    core.gates.ask(7, "v", [1])
    assert len(core.sent) == 3


@pytest.mark.parametrize("ids", [[], [100], [-1], [True], ["1"], [1] * 20])
def test_ids_that_the_model_cannot_compute(ids: list[Any]) -> None:
    core = Core()
    with pytest.raises(AdapterError) as caught:
        core.gates.ask(7, "v", ids)
    assert caught.value.code == "bad_value" and not core.sent
