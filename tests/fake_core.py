"""An engine core of vLLM's own scheduler, requests and block hashes; the workers are made up.

The made-up worker writes the version of the adapter that computes a token into the token's place in
the KV cache, so that a test can say which weights a block comes from.
"""

from __future__ import annotations

import functools
import queue
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import torch
from fake_workers import Engine
from vllm import SamplingParams
from vllm.config import CacheConfig, LoRAConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.lora.request import LoRARequest
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreRequest, FinishReason
from vllm.v1.engine.core import EngineCore
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.structured_output import StructuredOutputManager

from vllm_lora_ext import plugin
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.plan import plan_of

plugin.register()
BLOCK = 16
PROMPT = list(range(100, 100 + 3 * BLOCK + 5))
BASE = "tests/fixtures/bases/base_llama"


@functools.cache
def _config(slots: int, slot_wait_s: float, policy: str) -> VllmConfig:
    cache = CacheConfig(block_size=BLOCK, enable_prefix_caching=True)
    cache.num_gpu_blocks = 200
    return VllmConfig(
        model_config=ModelConfig(model=BASE, skip_tokenizer_init=True, dtype="float32"),
        scheduler_config=SchedulerConfig(
            max_num_seqs=16, max_num_batched_tokens=40, max_model_len=256,
            enable_chunked_prefill=True, is_encoder_decoder=False, async_scheduling=False,
            policy=policy,
        ),
        cache_config=cache, lora_config=LoRAConfig(max_lora_rank=8, max_loras=slots),
        additional_config={"lora_ext": {"slot_wait_s": slot_wait_s}},
    )  # fmt: skip


class Core:
    """A core without processes: `ranks` hold the adapters, `kv` what was computed."""

    def __init__(
        self, files: dict[str, str], slots: int = 2, remote: bool = False,
        slot_wait_s: float = 1.0, policy: str = "fcfs",
    ) -> None:  # fmt: skip
        self.workers = Engine(files)
        self.kv: dict[tuple[int, int], str] = {}
        self._tables: dict[str, list[int]] = {}
        self.plans: dict[str, Any] = {}
        self._lora: dict[str, str] = {}
        self.hits: list[int] = []
        self.batches: list[set[str]] = []
        config = _config(slots, slot_wait_s, policy)
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
        core = self.core = EngineCore.__new__(EngineCore)
        core.vllm_config, core.log_stats, core._weight_version = config, False, "default"
        core.model_executor = SimpleNamespace(
            collective_rpc=lambda method, timeout=None, args=(), kwargs=None: self.workers.rpc(
                method, *args
            ),
            execute_model=self._execute,
        )
        core.mm_receiver_cache = None
        core.structured_output_manager = StructuredOutputManager(config)
        core.scheduler = Scheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=200, kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
            ),
            structured_output_manager=core.structured_output_manager,
            block_size=BLOCK, hash_block_size=BLOCK,
        )  # fmt: skip
        init_none_hash(sha256)
        core.request_block_hasher = get_request_block_hasher(BLOCK, sha256)
        core.aborts_queue = queue.Queue()
        if remote:
            core.output_queue = queue.Queue()

    def _execute(self, scheduled: Any, non_block: bool) -> Future[ModelRunnerOutput]:
        at, hits = {}, {}
        for new in scheduled.scheduled_new_reqs:
            self._tables[new.req_id] = list(new.block_ids[0])
            self._lora[new.req_id] = new.lora_request and new.lora_request.lora_int_id
            at[new.req_id] = hits[new.req_id] = new.num_computed_tokens
            self.plans[new.req_id] = plan_of(new)
        cached = scheduled.scheduled_cached_reqs
        for i, key in enumerate(cached.req_ids):
            blocks, at[key] = cached.new_block_ids[i], cached.num_computed_tokens[i]
            if key in cached.resumed_req_ids:
                self._tables[key], hits[key] = list(blocks[0]), at[key]
            elif blocks is not None:
                self._tables[key] += blocks[0]
        for key, count in scheduled.num_scheduled_tokens.items():
            for pos in range(at[key], at[key] + count):
                self.kv[self._tables[key][pos // BLOCK], pos % BLOCK] = self._version(key)
        for key, found in hits.items():  # also what another request of this step has computed
            self._check_hit(key, found)
        keys = list(scheduled.num_scheduled_tokens)
        self.batches.append({self._lora[k] for k in keys} - {None})
        done = Future()
        done.set_result(ModelRunnerOutput(
            keys, {k: i for i, k in enumerate(keys)},
            [[7] if self._samples(k, at[k] + scheduled.num_scheduled_tokens[k]) else []
             for k in keys],
        ))  # fmt: skip
        return done

    def _samples(self, key: str, computed: int) -> bool:
        return computed >= self.core.scheduler.requests[key].num_tokens

    def _version(self, key: str) -> str:
        held = self.workers.ranks[0].held  # a step never reads a file
        return held[self._lora[key]] if self._lora[key] else "base"

    def _check_hit(self, key: str, count: int) -> None:
        self.hits.append(count)
        found = {self.kv[self._tables[key][p // BLOCK], p % BLOCK] for p in range(count)}
        assert found <= {self._version(key)}, f"{key} reads KV of {found}"

    def request(
        self, key: str, lora: LoRARequest | None, prompt: Any = None, n: int = 4, says: Any = None,
        resumable: bool = False, priority: int = 0,
    ) -> Any:  # fmt: skip
        params = SamplingParams(max_tokens=n, ignore_eos=True, extra_args=says)
        return EngineCoreRequest(
            key, list(prompt or PROMPT), None, params, None, 0.0, lora, None, None,
            resumable=resumable, priority=priority,
        )  # fmt: skip

    def add(self, key: str, lora: LoRARequest | None, **more: Any) -> None:
        self.core.add_request(*self.core.preprocess_add_request(self.request(key, lora, **more)))

    def step(self) -> list[Any]:
        outputs, _ = self.core.step()
        return outputs[0].outputs if outputs and 0 in outputs else []

    def finish(self) -> dict[str, Any]:
        """Steps until nothing is left; the last output of every request."""
        last = {}
        for _ in range(500):
            last |= {o.request_id: o for o in self.step() if o.finish_reason is not None}
            if not self.core.scheduler.has_requests():
                return last
        raise AssertionError("does not end")

    def write(self, path: str, version: str) -> None:
        for rank in self.workers.ranks:
            rank.files[path] = version


def lora(name: str, number: int, path: str = "/a", inplace: bool = False) -> LoRARequest:
    return LoRARequest(name, number, path, load_inplace=inplace)


def versions(core: Core) -> set[str]:
    """Of what was computed."""
    return set(core.kv.values())


def error_of(last: dict[str, Any], key: str) -> str:
    assert last[key].finish_reason is FinishReason.ERROR
    return AdapterError.parse(last[key].stop_reason).code
