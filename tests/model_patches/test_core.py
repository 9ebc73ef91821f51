"""The core's part, on vLLM's own scheduler, requests and block hashes; the workers are made up.

The made-up worker writes the version of the adapter that computes a token into the token's place in
the KV cache, so that a test can say which weights a block comes from.
"""

from __future__ import annotations

import copy
import functools
import queue
import random
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_workers import Engine
from vllm import SamplingParams
from vllm.config import CacheConfig, LoRAConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.lora.request import LoRARequest
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreRequest, FinishReason
from vllm.v1.engine.core import EngineCore, EngineCoreProc
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.structured_output import StructuredOutputManager

from vllm_lora_ext import plugin
from vllm_lora_ext.conditions.column import Column
from vllm_lora_ext.conditions.recipe import DERIVED_IDS
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.core_adapters import adapters_of
from vllm_lora_ext.model_patches.core_calls import ADD, ROLL_BACK, STATE
from vllm_lora_ext.model_patches.gate_pass import FINISH
from vllm_lora_ext.model_patches.held import MEMORY_IDS
from vllm_lora_ext.model_patches.plan import plan_of
from vllm_lora_ext.model_patches.residency import Prepared, SlotPart
from vllm_lora_ext.model_patches.traffic import Traffic

plugin.register()
BLOCK = 16
PROMPT = list(range(100, 100 + 3 * BLOCK + 5))
BASE = "tests/fixtures/bases/base_llama"


@functools.cache
def _config(slots: int) -> VllmConfig:
    cache = CacheConfig(block_size=BLOCK, enable_prefix_caching=True)
    cache.num_gpu_blocks = 200
    return VllmConfig(
        model_config=ModelConfig(model=BASE, skip_tokenizer_init=True, dtype="float32"),
        scheduler_config=SchedulerConfig(
            max_num_seqs=16, max_num_batched_tokens=40, max_model_len=256,
            enable_chunked_prefill=True, is_encoder_decoder=False, async_scheduling=False,
        ),
        cache_config=cache, lora_config=LoRAConfig(max_lora_rank=8, max_loras=slots),
    )  # fmt: skip


class Core:
    """A core without processes: `ranks` hold the adapters, `kv` what was computed."""

    def __init__(self, files: dict[str, str], slots: int = 2, remote: bool = False) -> None:
        self.workers = Engine(files)
        self.kv: dict[tuple[int, int], str] = {}
        self._tables: dict[str, list[int]] = {}
        self.plans: dict[str, Any] = {}
        self._lora: dict[str, str] = {}
        self.hits: list[int] = []
        self.batches: list[set[str]] = []
        config = _config(slots)
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
        resumable: bool = False,
    ) -> Any:  # fmt: skip
        params = SamplingParams(max_tokens=n, ignore_eos=True, extra_args=says)
        return EngineCoreRequest(
            key, list(prompt or PROMPT), None, params, None, 0.0, lora, None, None,
            resumable=resumable,
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


@pytest.fixture
def core() -> Core:
    return Core({"/a": "v1", "/b": "w1", "/c": "x1"})


def test_a_request_has_its_adapter_loaded_before_its_step(core):
    core.add("r", lora("a", 1))
    assert core.workers.ranks[1].held == {1: "v1"}
    assert core.finish()["r"].finish_reason is FinishReason.LENGTH
    assert core.batches[0] == {1}


def test_a_request_whose_adapter_is_gone_ends_alone(core):
    core.add("good", lora("a", 1))
    core.add("bad", lora("x", 2, "/gone"))
    core.add("base", None)
    last = core.finish()
    assert {k: o.finish_reason.name for k, o in last.items()} == {
        "good": "LENGTH", "bad": "ERROR", "base": "LENGTH"
    }  # fmt: skip
    assert AdapterError.parse(last["bad"].stop_reason).code == "not_found"
    assert "bad" not in core.core.scheduler.requests


def test_a_refusal_alone_comes_without_a_request_to_step(core):
    core.add("bad", lora("x", 2, "/gone"))
    (output,) = core.step()
    assert output.request_id == "bad" and output.finish_reason is FinishReason.ERROR
    assert core.step() == []


def test_what_steps_taken_aside_put_out_comes_in_its_order(core):
    """An engine in the front end's own process computes a gate while others answer."""
    core.add("first", None, n=6)
    core.add("second", None, n=2)
    rpc = core.workers.rpc
    core.workers.rpc = lambda method, *args: (
        [{"gate": "g"}] if method == FINISH else rpc(method, *args)
    )
    core.core.step_fn, core.core.post_step = core.core.step, lambda executed: None
    adapters, outputs = core.core._lora_ext, core.step()
    answer = adapters.gates.ask(7, "v", PROMPT)
    assert adapters._named() == {7}, "no load of another may put it out"
    while not answer.done():
        adapters.step_aside()
    assert answer.result() == {"gate": "g", "computed": True}
    assert not adapters._named()
    while core.core.scheduler.has_requests():
        outputs += core.step()
    for key, count in (("first", 6), ("second", 2)):
        mine = [o for o in outputs if o.request_id == key]
        assert sum(len(o.new_token_ids) for o in mine) == count
        assert [o.finish_reason is not None for o in mine] == [False] * (len(mine) - 1) + [True]
    assert {o.request_id for o in outputs} == {"first", "second"}


def test_a_core_of_its_own_process_sends_the_refusal_to_the_right_client():
    core = Core({}, remote=True)
    request = core.request("bad", lora("x", 2, "/gone"))
    request.client_index = 3
    core.core.add_request(*core.core.preprocess_add_request(request))
    client, outputs = core.core.output_queue.get_nowait()
    assert client == 3 and outputs.finished_requests == {"bad"}
    assert "not_found" in outputs.outputs[0].stop_reason


def test_evicted_meanwhile_is_loaded_again(core):
    for rank in core.workers.ranks:
        rank.room = 1
    for turn in range(3):
        core.add(f"a{turn}", lora("a", 1))
        core.finish()
        core.add(f"b{turn}", lora("b", 2, "/b"))
        core.finish()
    assert max(core.hits) > 0  # and from the prefix cache, where the content is the same
    core.write("/a", "v2")
    core.add("new", lora("a", 1))
    core.finish()
    assert core.hits[-1] == 0


def test_an_unreadable_disk_after_the_load_is_no_ones_end(core):
    core.add("first", lora("a", 1))
    for rank in core.workers.ranks:
        rank.files.clear()
    core.add("second", lora("a", 1))
    last = core.finish()
    assert {o.finish_reason for o in last.values()} == {FinishReason.LENGTH}


@pytest.mark.parametrize("how", ["place", "id"])
def test_new_weights_never_answer_from_old_kv(core, how):
    core.add("old", lora("a", 1))
    core.finish()
    core.write("/a", "v2")
    core.add("new", lora("a", 1, inplace=True) if how == "place" else lora("a", 2))
    core.finish()
    assert core.hits == [0, 0]
    core.add("again", lora("a", 1 if how == "place" else 2))
    core.finish()
    assert core.hits[-1] == 3 * BLOCK


def test_the_old_weights_come_back_to_their_kv(core):
    core.add("old", lora("a", 1))
    core.finish()
    for version in ("v2", "v1"):
        core.write("/a", version)
        core.add(version, lora("a", 1, inplace=True))
        core.finish()
    assert core.hits == [0, 0, 3 * BLOCK]


def test_equal_content_shares_whatever_it_is_called(core):
    core.write("/b", "v1")
    core.add("a", lora("a", 1))
    core.finish()
    core.add("b", lora("b", 2, "/b"))
    core.finish()
    assert core.hits == [0, 3 * BLOCK]


def test_the_base_shares_with_no_adapter(core):
    core.add("base", None)
    core.finish()
    core.add("a", lora("a", 1))
    core.finish()
    assert core.hits == [0, 0]


def test_hashed_before_and_run_after_a_replacement(core):
    """The thread that takes requests in hashes them before the replacement is handled."""
    core.add("old", lora("a", 1))
    core.finish()
    waiting = core.core.preprocess_add_request(core.request("new", lora("a", 1)))
    core.write("/a", "v2")
    assert core.core.add_lora(lora("a", 1, inplace=True))
    core.core.add_request(*waiting)
    core.finish()
    assert core.hits[-1] == 0
    core.add("again", lora("a", 1))
    core.finish()
    assert core.hits[-1] == 3 * BLOCK


def test_waiting_while_its_adapter_is_replaced(core):
    core.add("old", lora("a", 1))
    core.finish()
    core.add("new", lora("a", 1))
    core.write("/a", "v2")
    core.core.add_lora(lora("a", 1, inplace=True))
    core.add("newer", lora("a", 1))
    core.finish()
    assert core.hits == [0, 3 * BLOCK, 0], "it ends on the version that it came in with"


def versions(core: Core) -> set[str]:
    """Of what was computed."""
    return set(core.kv.values())


def test_two_versions_share_a_step(core):
    core.add("old", lora("a", 1), n=20)
    for _ in range(3):
        core.step()
    core.write("/a", "v2")
    core.core.add_lora(lora("a", 1, inplace=True))
    core.add("new", lora("a", 1), n=20)
    adapters = {request.lora_request for request in core.core.scheduler.requests.values()}
    assert len(adapters) == 2, "vLLM's runners keep those of a step in a set, by name"
    last = core.finish()
    assert {o.finish_reason for o in last.values()} == {FinishReason.LENGTH}
    assert max(len(batch) for batch in core.batches) == 2 and versions(core) == {"v1", "v2"}


def test_a_request_gets_the_version_it_was_promised(core):
    core.add("old", lora("a", 1))
    core.finish()
    core.write("/a", "v2")
    core.core.add_lora(lora("a", 1, inplace=True))
    promised = {"lora_ext": {"version": "v1"}}
    core.add("promised", lora("a", 1), says=promised)
    core.finish()
    assert core.hits == [0, 3 * BLOCK] and versions(core) == {"v1"}
    core.add("never", lora("a", 1), says={"lora_ext": {"version": "v0"}})
    assert error_of(core.finish(), "never") == "adapter_changed"
    core.core.remove_lora(1)
    core.add("late", lora("a", 1), says=promised)
    assert error_of(core.finish(), "late") == "not_found"


def test_what_was_removed_under_way_is_gone_when_the_engine_is_idle(core):
    core.add("r", lora("a", 1))
    core.step()
    core.core.remove_lora(1)
    assert core.workers.ranks[0].held == {1: "v1"}
    assert core.finish()["r"].finish_reason is FinishReason.LENGTH
    assert core.workers.ranks[0].held == {} and core.core.list_loras() == set()


def test_rolled_back(core):
    core.core.add_lora(lora("a", 1))
    core.write("/c", "v2")
    core.core.add_lora(lora("a", 1, "/c", inplace=True))
    back = getattr(core.core, ROLL_BACK)
    answer = back(["a", 1, "/c"], "v1", "v2")
    assert (answer["version"], answer["path"]) == ("v1", "/a")
    core.add("r", lora("a", 1))
    core.finish()
    assert versions(core) == {"v1"}
    assert "version_conflict" in back(lora("a", 1), "v2", "v2")["error"]


def test_what_is_held_and_what_was_counted(core):
    for rank in core.workers.ranks:
        rank.traffic = Traffic(5, 3, 100, 0.5)
    core.core.add_lora(lora("a", 1))
    core.add("r", lora("a", 1))
    state = getattr(core.core, STATE)
    (row,) = state(False)["adapters"]
    assert (row["name"], row["version"], row["in_flight"]) == ("a", "v1", 1)
    counts = state(True)["counts"]
    assert counts == {"steps": 5, "activations": 3, "bytes": 200, "seconds": 0.5}
    core.workers.ranks[0].traffic.activations = 4
    assert state(True)["counts"] == {"steps": 0, "activations": 1, "bytes": 0, "seconds": 0}
    assert state(True)["experts"] == {"a": [1.5, 0.5]}
    assert not {"counts", "experts"} & state(False).keys()
    core.finish()


ALORA = Column(invocation=(PROMPT[40], PROMPT[41]))


def aloras(core: Core) -> None:
    """Version v1 is an Activated LoRA; v2 one with another invocation, w1 is plain."""
    late = Column(invocation=(PROMPT[20], PROMPT[21]))
    for rank in core.workers.ranks:
        rank.made_of["v1"] = (SlotPart("v1", columns=(ALORA,)),)
        rank.made_of["v2"] = (SlotPart("v2", columns=(late,)),)
        rank.made_of["t1"] = ()
        rank.made_of["mix"] = (SlotPart("v1", by_row=True, columns=(ALORA,)), SlotPart("w1", 0.5))
    core._check_hit = lambda key, count: core.hits.append(count)


def error_of(last: dict[str, Any], key: str) -> str:
    assert last[key].finish_reason is FinishReason.ERROR
    return AdapterError.parse(last[key].stop_reason).code


def test_a_request_that_says_nothing_has_its_adapters_columns(core):
    aloras(core)
    params = SamplingParams(max_tokens=4)
    core.add("base", None)
    core.finish()
    core.add("first", lora("a", 1))
    core.finish()
    core.add("again", lora("a", 1))
    core.finish()
    core.add("plain", lora("b", 2, "/b"))
    core.finish()
    assert core.hits == [0, 2 * BLOCK, 3 * BLOCK, 0], "the base's blocks before it starts"
    assert core.plans["first"].columns == (ALORA,) and core.plans["plain"] is None
    core.add("base2", None, prompt=[*PROMPT])
    core.finish()
    assert core.hits[-1] == 3 * BLOCK and params.extra_args is None


def test_a_plan_must_fit_what_is_loaded(core):
    aloras(core)
    other = {"lora_ext": {"columns": [{"invocation": [1]}]}}
    for key, says in {
        "none": {"lora_ext": {"columns": []}}, "other": other,
        "unknown": {"lora_ext": {"columns": [{"x": 1}]}}, "no_list": {"lora_ext": {"columns": 3}},
    }.items():  # fmt: skip
        core.add(key, lora("a", 1), says=says)
    core.add("fits", lora("a", 1), says={"lora_ext": {"columns": [ALORA.to_dict()]}, "x": 1})
    core.add("session", lora("a", 1), resumable=True)
    last = core.finish()
    codes = {key: error_of(last, key) for key in last if key != "fits"}
    assert codes == {
        "none": "adapter_changed", "other": "adapter_changed", "unknown": "unknown_key",
        "no_list": "bad_value", "session": "unsupported_feature",
    }  # fmt: skip
    assert last["fits"].finish_reason is FinishReason.LENGTH


def test_a_template_waits_for_what_it_needs(core):
    aloras(core)
    core.write("/t", "t1")
    assert core.core.add_lora(lora("t", 3, "/t")), "it can be loaded, and waits for requests"
    core.add("template", lora("t", 3, "/t"))
    last = core.finish()
    assert error_of(last, "template") == "missing_setting"
    with pytest.raises(AdapterError, match="missing_setting"):
        core.core.pin_lora(3)


def test_a_derived_adapter_of_an_old_part_keeps_its_keys(core):
    aloras(core)
    core.write("lora_ext:mix", "mix")
    mix = lora("mix", DERIVED_IDS, "lora_ext:mix")
    says = {"lora_ext": {"columns": [{"spans": [[0, None]]}, ALORA.to_dict()]}}
    core.add("mix", mix, says=says)
    core.finish()
    core.core.add_lora(lora("a", 1))
    core.write("/a", "v2")
    core.core.add_lora(lora("a", 1, inplace=True))
    core.add("again", mix, says=says)
    core.finish()
    assert core.hits == [0, 3 * BLOCK]
    core.write("lora_ext:other", "w1")  # of another recipe, whose id is the same
    core.add("other", lora("other", DERIVED_IDS, "lora_ext:other"))
    assert core.finish()["other"].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("connector", ["LMCacheConnectorV1", "OffloadingConnector"])
def test_connectors_with_keys_of_their_own(core, connector):
    aloras(core)
    core.core.add_lora(lora("a", 1))
    core.core._lora_ext._conditions._connector = connector
    core.add("alora", lora("a", 1))
    core.add("plain", lora("b", 2, "/b"))
    last = core.finish()
    assert last["plain"].finish_reason is FinishReason.LENGTH
    if connector == "LMCacheConnectorV1":
        assert error_of(last, "alora") == "unsupported_feature"
    else:
        assert last["alora"].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("when", ["waiting", "running", "preempted"])
def test_columns_that_change_under_a_request(core, when):
    """A worker that knows a request knows its old columns."""
    aloras(core)
    core.add("r", lora("a", 1), n=30)
    if when != "waiting":
        core.step()
        core.step()
    if when == "preempted":
        core.core.scheduler._preempt_request(core.core.scheduler.running.pop(), 0.0)
    for rank in core.workers.ranks:  # by a tool that calls the workers
        rank.held[1] = "v2"
    core.core.collective_rpc("remove_lora", args=(99,))
    last = core.finish()
    if when == "waiting":
        assert last["r"].finish_reason is FinishReason.LENGTH
        assert core.plans["r"].columns[0].invocation == (PROMPT[20], PROMPT[21])
    else:
        assert error_of(last, "r") == "adapter_changed"


def test_positions_of_answers_that_come_too_late(core):
    aloras(core)
    core.write("lora_ext:mix", "mix")
    mix = lora("mix", DERIVED_IDS, "lora_ext:mix")
    core.core.add_lora(lora("a", 1))
    core.core._lora_ext._conditions._ahead = True
    for key, stop in (("late", len(PROMPT) + 1), ("end", len(PROMPT)), ("open", None)):
        columns = [{"spans": [[3, stop]]}, ALORA.to_dict()]
        core.add(key, mix, says={"lora_ext": {"columns": columns}})
    last = core.finish()
    assert error_of(last, "late") == "unsupported_feature"
    assert {last[k].finish_reason for k in ("end", "open")} == {FinishReason.LENGTH}


@pytest.mark.parametrize("steps", range(1, 8))
def test_running_while_its_adapter_is_replaced(core, steps):
    """Neither version may ever read what it computed across the replacement."""
    core.add("across", lora("a", 1), n=40)
    for _ in range(steps):
        core.step()
    core.write("/a", "v2")
    core.core.add_lora(lora("a", 1, inplace=True))
    core.finish()
    text = PROMPT + [7] * 40
    for turn in range(2):  # the first makes the way to what stands further back
        core.add(f"v2-{turn}", lora("a", 1), prompt=text)
        core.finish()
    core.write("/a", "v1")
    core.add("v1", lora("a", 1, inplace=True), prompt=text)
    core.finish()


@pytest.mark.parametrize("seed", range(20))
def test_no_order_of_events_mixes_versions(seed):
    """Adds, steps, replacements, aborts, preemptions and removals, in any order."""
    rng, core, count = random.Random(seed), Core({"/a": "v0", "/b": "v1"}), 0
    for _ in range(120):
        what = rng.choice(["add"] * 4 + ["step"] * 6 + ["replace", "abort", "preempt", "remove"])
        number = rng.choice((1, 2))
        if what == "add":
            count += 1
            adapter = rng.choice((None, lora(f"n{number}", number, ("/a", "/b")[number - 1])))
            start = rng.choice((0, 0, 500))
            prompt = [start + t for t in range(rng.randrange(5, 4 * BLOCK))]
            core.add(f"r{count}", adapter, prompt=prompt, n=rng.randrange(1, 2 * BLOCK))
        elif what == "step":
            core.step()
        elif what == "replace":
            core.write(("/a", "/b")[number - 1], f"v{rng.randrange(3)}")
            core.core.add_lora(lora(f"n{number}", number, ("/a", "/b")[number - 1], True))
        elif what == "abort" and core.core.scheduler.requests:
            core.core.abort_requests([rng.choice(list(core.core.scheduler.requests))])
        elif what == "preempt" and core.core.scheduler.running:
            request = core.core.scheduler.running.pop()
            core.core.scheduler._preempt_request(request, 0.0)
        elif what == "remove":
            core.core.remove_lora(number)
    core.finish()
    assert max(core.hits) > 0


def test_pinned_slots_are_left_out_of_every_plan():
    core = Core({"/a": "v"}, slots=3)
    for number in range(1, 7):
        core.core.add_lora(lora(f"n{number}", number))
    assert core.core.pin_lora(1) and core.core.pin_lora(2)
    for number in range(1, 7):
        core.add(f"r{number}", lora(f"n{number}", number), prompt=[number] * 4)
    last = core.finish()
    assert len(last) == 6
    assert max(len(batch - {1, 2}) for batch in core.batches) == 1
    assert {1, 2} < max(core.batches, key=len)  # the pinned ones take part in every step


def test_all_pinned_serves_the_pinned_and_refuses_the_others():
    core = Core({"/a": "v"}, slots=2)
    for number in (1, 2):
        core.core.add_lora(lora(f"n{number}", number))
        assert core.core.pin_lora(number)
    for number in (1, 2, 3):
        core.add(f"r{number}", lora(f"n{number}", number), prompt=[number] * 4)
    last = core.finish()
    assert [last[f"r{n}"].finish_reason.name for n in (1, 2, 3)] == ["LENGTH", "LENGTH", "ERROR"]
    assert "slots_pinned" in last["r3"].stop_reason


def test_workers_that_were_called_directly(core):
    """A tool of reinforcement learning replaces weights through `collective_rpc`."""
    core.add("old", lora("a", 1))
    core.finish()
    for rank in core.workers.ranks:
        rank.held[1] = "trained"
    core.core.collective_rpc("remove_lora", args=(99,))
    core.add("new", lora("a", 1))
    core.finish()
    assert core.hits == [0, 0]


def test_a_step_without_a_load_under_way_asks_the_scheduler_nothing(core, monkeypatch):
    adapters = adapters_of(core.core)
    assert not adapters.loading.pending
    monkeypatch.setattr(core.core.scheduler, "has_requests", lambda: pytest.fail("asked"))
    assert adapters.step(lambda: ({}, False)) == ({}, False)


def test_the_answer_of_add_names_what_was_evicted(core):
    for rank in core.workers.ranks:
        rank.room = 1
    add = getattr(core.core, ADD)
    said = {"understands": {"columns": [], "user": None, "instruction": False}, "before": None}
    assert add(lora("a", 1)) == {
        "version": "v1",
        "path": "/a",
        "evicted": [],
        "before": None,
        **said,
    }
    again = add(["b", 2, "/b"])  # as it comes over the wire
    assert again == {"version": "w1", "path": "/b", "evicted": [1], "before": None, **said}
    assert "not_found" in add(lora("x", 3, "/gone"))["error"]


@pytest.fixture
def process(core, monkeypatch):
    """A core in a process of its own, whose loop takes turns with requests."""
    monkeypatch.setattr("vllm_lora_ext.model_patches.loading._EVERY", 0.0)
    core.core.__class__ = EngineCoreProc
    core.core.engines_running, core.core.batch_queue = False, None
    core.core.output_queue = queue.Queue()
    return core


def test_a_core_in_a_process_of_its_own_steps_on_while_workers_read(process):
    first, second = process.workers.ranks
    add = getattr(process.core, ADD)
    assert not process.core.has_work()
    second.slow.add(1)
    future = add(lora("a", 1))
    assert process.core.has_work() and not future.done()
    process.add("base", None)
    assert process.finish()["base"].finish_reason is FinishReason.LENGTH
    assert not future.done() and first.held == {} and process.core.has_work()
    second.slow.clear()
    process.step()
    assert future.result()["version"] == "v1" and second.held == {1: "v1"}
    assert not process.core.has_work()
    assert add(lora("a", 1))["version"] == "v1", "held: at once"


def test_loads_of_one_id_follow_each_other_and_others_do_not_wait(process):
    for rank in process.workers.ranks:
        rank.slow.add(1)
    add = getattr(process.core, ADD)
    first, other = add(lora("a", 1)), add(lora("b", 2, "/b"))
    process.step()
    again = add(lora("a", 1, "/c", inplace=True))
    assert other.result()["version"] == "w1" and not first.done()
    for rank in process.workers.ranks:
        rank.slow.clear()
    process.step()
    assert first.result()["version"] == "v1" and not again.done()
    process.step()
    assert again.result()["version"] == "x1"
    assert set(process.workers.ranks[0].held.values()) == {"v1", "x1", "w1"}
    process.add("r", lora("a", 1, "/c"))
    process.finish()
    assert versions(process) == {"x1"}


def test_two_loaders_of_one_adapter_at_once(process):
    """The second finds the version gone that it meant to replace."""
    add = getattr(process.core, ADD)
    add(lora("a", 1))
    process.step()
    first = add(lora("a", 1, "/b", inplace=True), None, "v1")
    second = add(lora("a", 1, "/c", inplace=True), None, "v1")
    for _ in range(3):
        process.step()
    assert first.result()["version"] == "w1" and "version_conflict" in second.result()["error"]
    assert "version_conflict" in add(lora("a", 1, "/c", inplace=True), None, "v1")["error"]
    assert [rank.reading for rank in process.workers.ranks] == [{}, {}]
    assert set(process.workers.ranks[0].held.values()) == {"v1", "w1"}


def test_tensors_are_sent_once_and_a_refused_load_leaves_nothing_behind(process):
    sent = []
    for rank in process.workers.ranks:
        load = rank.load
        rank.load = lambda r, s, u, load=load: (sent.append(s), load(r, s, u))[1]
    add = getattr(process.core, ADD)
    future = add(lora("m", MEMORY_IDS + 1, "memory:m", inplace=True), [b"tensors", None, {}])
    process.step()
    assert future.result()["version"] == "tensors"
    assert sent == [Prepared(), Prepared()]
    refused = add(lora("other", MEMORY_IDS + 1, "memory:o", inplace=True), [b"t", None, {}])
    process.step()
    assert "id_in_use" in refused.result()["error"]
    gone = add(lora("x", 3, "/gone"))
    process.step()
    assert "not_found" in gone.result()["error"]
    assert [rank.reading for rank in process.workers.ranks] == [{}, {}]


def test_a_request_that_cannot_wait_has_its_adapter_at_once(process):
    for rank in process.workers.ranks:
        rank.slow.add(1)
    future = getattr(process.core, ADD)(lora("a", 1))
    process.add("r", lora("a", 1))
    assert process.finish()["r"].finish_reason is FinishReason.LENGTH
    for rank in process.workers.ranks:
        rank.slow.clear()
    process.step()
    assert future.result()["version"] == "v1"


def test_an_engine_without_lora_is_left_alone():
    core = Core({})
    core.core.vllm_config = copy.copy(core.core.vllm_config)
    core.core.vllm_config.lora_config = None
    core.add("base", None)
    core.finish()
    assert "_lora_ext" not in core.core.__dict__
