"""Both model runners' ways from a scheduler's output to rows, on a CPU, without a model.

V2's are its own: its request states, its batch order, its `InputBatch` and `LoraState`; what are
Triton kernels there is written out in torch here. V1 orders its rows by a batch that outlives the
step, here by chance. `Schedule` draws what a scheduler might: new requests, chunks of prompts,
prefix-cache hits, drafts, preempted and resumed requests, finished ones, ids that come again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import vllm.v1.worker.gpu.buffer_utils as buffer_utils
import vllm.v1.worker.gpu.model_runner as v2
import vllm.v1.worker.gpu_worker as gpu_worker
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.worker.gpu.input_batch import InputBuffers
from vllm.v1.worker.gpu.lora_utils import LoraState
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

MAX_REQS, MAX_LEN, MAX_TOKENS, DRAFTS, SLOTS = 6, 64, 512, 2, 3


def token(number: int, position: int) -> int:
    """Tells which request and position a row of input ids belongs to."""
    return 1000 * number + position


@dataclass
class Said:
    """A request as the test knows it."""

    key: str
    number: int
    prompt_len: int
    lora: int  # 0: the base model
    wanted: bool
    computed: int = 0
    total: int = 0  # known tokens: prompt and answer
    steps: int = 0

    @property
    def tokens(self) -> list[int]:
        return [token(self.number, at) for at in range(self.total)]

    def data(self) -> NewRequestData:
        params = SamplingParams(extra_args={"wanted": 1} if self.wanted else None)
        lora = LoRARequest(f"lora{self.lora}", self.lora, "/none") if self.lora else None
        return NewRequestData(
            self.key, self.tokens[: self.prompt_len], [], params, None, ([],), self.computed, lora,
            prefill_token_ids=self.tokens,
        )  # fmt: skip


@dataclass
class Step:
    scheduled: SchedulerOutput
    counts: dict[str, int]  # rows of each request
    drafts: dict[str, int]


@dataclass
class Schedule:
    """Draws steps. `resumed_as_new`: as for V2, a request goes on as a new one."""

    rng: np.random.Generator
    resumed_as_new: bool
    waiting: list[Said] = field(default_factory=list)
    running: dict[str, Said] = field(default_factory=dict)
    finished: set[str] = field(default_factory=set)
    numbers: int = 0

    def by_key(self, key: str) -> Said:
        return self.running[key]

    def _chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def _new_request(self, joining: list[Said]) -> Said:
        self.numbers += 1
        keys = [f"r{i}" for i in range(8)]
        taken = set(self.running) | {r.key for r in (*self.waiting, *joining)}
        key = str(self.rng.choice([k for k in keys if k not in taken]))
        length = int(self.rng.integers(1, 20))
        said = Said(key, self.numbers, length, int(self.rng.integers(0, SLOTS + 1)),
                    self._chance(0.6), total=length)  # fmt: skip
        said.computed = int(self.rng.integers(0, length))  # from the prefix cache
        return said

    def draw(self) -> Step:
        """The next step; `done` is to be called when it has run."""
        for key in list(self.running):
            if self._chance(0.12):
                self.finished.add(key)
                del self.running[key]
        for said in list(self.waiting):
            if self._chance(0.08):  # aborted while it waits
                self.finished.add(said.key)
                self.waiting.remove(said)
        out = SchedulerOutput.make_empty()
        preempted = [r for r in self.running.values() if self._chance(0.15)]
        for said in preempted:
            del self.running[said.key]
            said.computed = int(self.rng.integers(0, said.total))
        old = [r for r in self.running.values() if self._chance(0.85)]
        joining = [r for r in self.waiting if self._chance(0.6)]
        self.waiting = [r for r in self.waiting if r not in joining] + preempted
        while self._chance(0.5) and len(self.running) + len(self.waiting) + len(joining) < MAX_REQS:
            joining.append(self._new_request(joining))
        out.preempted_req_ids = {r.key for r in preempted} if self.resumed_as_new else None
        self.running |= {r.key: r for r in joining}
        fresh = [r for r in joining if self.resumed_as_new or not r.steps]
        resumed = [r for r in joining if r not in fresh]
        cached = [*old, *resumed]
        out.scheduled_new_reqs = [r.data() for r in fresh]
        out.scheduled_cached_reqs = CachedRequestData(
            [r.key for r in cached], {r.key for r in resumed}, [], {}, [None] * len(cached),
            [r.computed for r in cached], [r.total - r.prompt_len for r in cached],
        )  # fmt: skip
        counts, drafts = {}, {}
        for said in [*old, *joining]:
            left = said.total - said.computed
            counts[said.key] = int(self.rng.integers(1, left + 1))
            if left == 1 and said.steps and self._chance(0.4):
                drafts[said.key] = int(self.rng.integers(1, DRAFTS + 1))
                counts[said.key] += drafts[said.key]
        out.num_scheduled_tokens = counts
        out.total_num_scheduled_tokens = sum(counts.values())
        out.scheduled_spec_decode_tokens = {k: [-1] * n for k, n in drafts.items()}
        out.finished_req_ids, self.finished = self.finished, set()
        return Step(out, counts, drafts)

    def done(self, step: Step) -> None:
        for key, count in step.counts.items():
            said, drafts = self.running[key], step.drafts.get(key, 0)
            accepted = int(self.rng.integers(0, drafts + 1)) if drafts else 0
            said.computed += count - drafts + accepted
            said.steps += 1
            if said.computed >= said.total:
                said.total = said.computed + 1
            if said.total > MAX_LEN - DRAFTS - 2:
                self.finished.add(key)
                del self.running[key]


class Manager:
    """What `Rows` asks of an adapter manager; its slots are in an order of their own."""

    def __init__(self) -> None:
        self.lora_index_to_id: list[int | None] = [2, None, 3, 1]

    def slot(self, lora: int) -> int:
        return self.lora_index_to_id.index(lora) if lora else -1


class _Runner(LoRAModelRunnerMixin):
    is_pooling_model = False
    execute_model_state: Any = None

    def __init__(self, manager: Manager) -> None:
        self.set_up()
        self.lora_manager = SimpleNamespace(
            _adapter_manager=manager, set_active_adapters=self._set_active_adapters
        )
        self.lora_config, self.token_loras, self.batch = SimpleNamespace(), (), None
        self.schedule: Any = None

    def set_up(self) -> None:
        pass

    def _set_active_adapters(self, requests: Any, mapping: Any) -> None:
        self.token_loras = mapping.index_mapping


class RunnerV1(_Runner):
    """`execute_model` as far as the LoRA mapping."""

    def execute_model(self, scheduled: SchedulerOutput, _: Any = None) -> None:
        keys = list(scheduled.num_scheduled_tokens)
        self.schedule.rng.shuffle(keys)
        if keys:
            counts = np.array([scheduled.num_scheduled_tokens[k] for k in keys], dtype=np.int32)
            loras = np.array([self.schedule.by_key(k).lora for k in keys])
            inputs = tuple(loras), tuple(loras.repeat(counts)), set()
            batch: Any = SimpleNamespace(req_ids=keys, make_lora_inputs=lambda *_: inputs)
            self.set_active_loras(batch, counts)
            firsts = [self.schedule.by_key(k) for k in keys]
            self.input_ids = [
                token(r.number, r.computed + i) for r, n in zip(firsts, counts, strict=True)
                for i in range(n)
            ]  # fmt: skip
            self.forward()

    def forward(self) -> None:
        """The test's."""


class RunnerV2(_Runner, v2.GPUModelRunner):
    """V2's own states, order and batch."""

    is_last_pp_rank = False
    pooling_runner = pp_handler = encoder_cache = prompt_logprobs_worker = None
    adaptive_verification = pcp_manager = fast_prefill = sampler = None
    use_pp = False
    decode_query_len = DRAFTS + 1

    def set_up(self) -> None:
        self.device = torch.device("cpu")
        self.max_num_reqs = MAX_REQS
        self.req_states = RequestState(MAX_REQS, MAX_LEN, MAX_TOKENS, DRAFTS, 100, self.device)
        self.input_buffers = InputBuffers(MAX_REQS, MAX_TOKENS, self.device)
        self.lora_state = LoraState(MAX_REQS)
        self.model_config = SimpleNamespace(rswa_window=None)
        nothing = lambda *_, **__: None  # noqa: E731
        self.model_state = SimpleNamespace(
            num_new_sampled_tokens_per_step=1, add_request=nothing, remove_request=nothing,
            apply_staged_writes=nothing,
        )  # fmt: skip
        self.block_tables = SimpleNamespace(append_block_ids=nothing)

    def execute_model(self, scheduled: SchedulerOutput, _: Any = None) -> None:
        self.finish_requests(scheduled)
        self.add_requests(scheduled)
        self.update_requests(scheduled)
        if not scheduled.total_num_scheduled_tokens:
            return
        self._on_the_device(scheduled)
        state, _count = self.gather_batch_req_state(scheduled, dummy_run=False)
        assert state is not None
        padded = state.num_tokens + int(self.schedule.rng.integers(0, 8))
        desc: Any = SimpleNamespace(num_tokens=padded, num_reqs=None)
        self.batch = batch = self.prepare_inputs(scheduled, state, desc, 0)
        self._set_active_loras(
            *self.lora_state.make_lora_inputs(
                batch.req_ids, batch.idx_mapping_np, batch.num_scheduled_tokens
            )
        )
        self.input_ids = batch.input_ids[: batch.num_tokens].tolist()
        self.forward()

    def _on_the_device(self, scheduled: SchedulerOutput) -> None:
        """What the steps before have left there: lengths, the last token, drafts."""
        for key in scheduled.num_scheduled_tokens:
            index, said = self.req_states.req_id_to_index[key], self.schedule.by_key(key)
            self.req_states.num_computed_tokens.gpu[index] = said.computed
            self.req_states.last_sampled_tokens[index] = token(said.number, said.total - 1)
            for i in range(DRAFTS):
                self.req_states.draft_tokens[index, i] = token(said.number, said.total + i)

    def forward(self) -> None:
        """The test's."""


def run(runner: _Runner, scheduled: SchedulerOutput) -> None:
    """Through the worker's entry."""
    worker: Any = SimpleNamespace(
        model_runner=runner, _pp_send_work=[], annotate_profile=lambda _: nullcontext(),
        use_v2_model_runner=True,
    )  # fmt: skip
    gpu_worker.Worker.execute_model(worker, scheduled)


def _prefill(
    ids: Any, _next: Any, mapping: Any, starts: Any, every: Any, lens: Any, done: Any
) -> None:
    for i, index in enumerate(mapping.tolist()):
        start, stop, at = int(starts[i]), int(starts[i + 1]), int(done[index])
        if at < lens[index]:
            ids[start:stop] = every[index, at : at + stop - start]


def _positions(mapping: Any, starts: Any, done: Any, pos: Any, lens: Any) -> None:
    for i, index in enumerate(mapping.tolist()):
        start, stop, at = int(starts[i]), int(starts[i + 1]), int(done[index])
        pos[start:stop] = torch.arange(at, at + stop - start)
        lens[i] = at + stop - start


def _combine(
    ids: Any, mapping: Any, last: Any, starts: Any, lens: Any, prefill: Any, drafts: Any, cu: Any,
    num_logits: int, _bonus: int,
) -> torch.Tensor:  # fmt: skip
    rows = torch.empty(num_logits, dtype=torch.int64)
    for i, index in enumerate(mapping.tolist()):
        first, after = int(cu[i]), int(cu[i + 1])
        count, stop = after - first, int(starts[i + 1])
        rows[first:after] = torch.arange(stop - count, stop)
        if lens[i] > prefill[index]:
            if lens[i] - count >= prefill[index]:
                ids[stop - count] = last[index, 0]
            if count > 1:
                ids[stop - count + 1 : stop] = drafts[index, : count - 1]
    return rows


def _expand(mapping: Any, total: int, cu: Any, _longest: int) -> Any:
    return mapping.repeat_interleave(torch.diff(cu).long()), torch.zeros(total)


def _apply_write(self: Any) -> None:
    at = 0
    rows = zip(self._staged_write_indices, self._staged_write_starts, self._staged_write_cu_lens,
               strict=True)  # fmt: skip
    for index, start, stop in rows:
        values = torch.tensor(self._staged_write_contents[at:stop], dtype=self.dtype)
        if self.gpu.dim() == 1:
            self.gpu[index] = values[0]
        else:
            self.gpu[index, start : start + len(values)] = values
        at = stop
    self.clear_staged_writes()


@contextmanager
def without_a_gpu() -> Iterator[None]:
    """V2's kernels in torch; a worker without process groups."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buffer_utils, "is_uva_available", lambda: False)
        patch.setattr(buffer_utils.StagedWriteTensor, "apply_write", _apply_write)
        patch.setattr(v2, "prepare_prefill_inputs", _prefill)
        patch.setattr(v2, "prepare_pos_seq_lens", _positions)
        patch.setattr(v2, "combine_sampled_and_draft_tokens", _combine)
        patch.setattr(v2, "expand_idx_mapping", _expand)
        group = SimpleNamespace(is_first_rank=True)
        patch.setattr(gpu_worker, "get_pp_group", lambda: group)
        yield
