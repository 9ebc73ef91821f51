"""The front ends' door, with a client of the core that only takes notes."""

from __future__ import annotations

import asyncio
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.admission import _patch_async, _patch_sync
from vllm_lora_ext.model_patches.admitted import Admitted
from vllm_lora_ext.model_patches.core_calls import ADD, ROLL_BACK
from vllm_lora_ext.model_patches.held import MEMORY_IDS
from vllm_lora_ext.model_patches.refused import RefusedRequest

CONFIG = {"peft_type": "LORA"}
TENSORS = {"a": torch.ones(2, 3)}
UNDERSTANDS = {"understands": {"columns": [], "user": None, "instruction": False}}


class Core:
    """What `call_utility` reaches: answers of the ledger, by path."""

    def __init__(self) -> None:
        self.asked: list[tuple[LoRARequest, Any]] = []
        self.expected: list[str | None] = []
        self.evicts: list[int] = []
        self.errors: dict[str, AdapterError] = {}
        self.taken: set[int] = set()

    def answer(
        self, method: str, request: LoRARequest, source: Any, expected: str | None
    ) -> dict[str, Any]:
        if method == ROLL_BACK:
            return {"version": source, "path": f"/{source}", "evicted": [], "read": False,
                    **UNDERSTANDS}  # fmt: skip
        assert method == ADD
        self.expected.append(expected)
        self.asked.append((request, source))
        if request.lora_int_id in self.taken:
            return {"error": str(AdapterError("id_in_use", "taken"))}
        if request.lora_path in self.errors:
            return {"error": str(self.errors[request.lora_path])}
        evicted, self.evicts = self.evicts, []
        return {
            "version": f"v{len(self.asked)}", "path": request.lora_path, "evicted": evicted,
            "read": True, **UNDERSTANDS,
        }  # fmt: skip

    @property
    def paths(self) -> list[str]:
        return [request.lora_path for request, _ in self.asked]


class SyncEngine:
    """Has the methods that are wrapped, and stock's signatures."""

    def __init__(self, lora: bool = True) -> None:
        self.core, self.added, self.removed = Core(), [], []
        self.vllm_config = SimpleNamespace(lora_config=SimpleNamespace() if lora else None)
        self.engine_core = SimpleNamespace(call_utility=self.core.answer)

    def add_request(self, request_id: str, prompt: Any, params: Any, lora_request: Any = None):
        self.added.append((prompt, lora_request))
        self.params = params
        return request_id

    def add_lora(self, lora_request: LoRARequest) -> bool:
        raise AssertionError("not without LoRA")

    def remove_lora(self, lora_id: int) -> bool:
        self.removed.append(lora_id)
        return True

    def pin_lora(self, lora_id: int) -> bool:
        raise Exception(f"Call to pin_lora failed: {AdapterError('slots_pinned', 'all pinned')}")

    def collective_rpc(self, method: Any, timeout: Any = None, args: Any = (), kwargs: Any = None):
        return [method]


class AsyncEngine(SyncEngine):
    def __init__(self, lora: bool = True) -> None:
        super().__init__(lora)
        answer = self.core.answer

        async def call(*args: Any, engine: bytes) -> Any:
            return answer(*args)

        self.engine_core = SimpleNamespace(_call_utility_async=call, core_engines=[b"0"])

    async def add_request(self, request_id: str, prompt: Any, params: Any, lora_request=None):
        return super().add_request(request_id, prompt, params, lora_request)

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        return super().add_lora(lora_request)

    async def remove_lora(self, lora_id: int) -> bool:
        return super().remove_lora(lora_id)

    async def pin_lora(self, lora_id: int) -> bool:
        return super().pin_lora(lora_id)

    async def collective_rpc(self, *args: Any, **kwargs: Any) -> Any:
        return super().collective_rpc(*args, **kwargs)


@pytest.fixture(params=["sync", "async"])
def engine(request: pytest.FixtureRequest) -> Any:
    base = SyncEngine if request.param == "sync" else AsyncEngine
    methods = {n: f for n, f in vars(base).items() if inspect.isfunction(f)}
    cls = type("Engine", (base,), methods)  # a class of its own to wrap
    (_patch_sync if request.param == "sync" else _patch_async)(cls)
    cls.__init__ = base.__init__
    return cls()


def do(result: Any) -> Any:
    return asyncio.run(result) if inspect.iscoroutine(result) else result


def lora(name: str, number: int, inplace: bool = False) -> LoRARequest:
    return LoRARequest(name, number, f"/{name}", load_inplace=inplace)


def test_an_adapter_is_asked_for_once(engine):
    for _ in range(3):
        do(engine.add_request("r", "p", None, lora("a", 1)))
    do(engine.add_request("r", "p", None, lora_request=lora("a", 1)))
    do(engine.add_request("r", "p", None))
    assert engine.core.paths == ["/a"] and len(engine.added) == 5


def test_what_was_evicted_is_asked_for_again(engine):
    do(engine.add_request("r", "p", None, lora("a", 1)))
    engine.core.evicts = [1]
    do(engine.add_request("r", "p", None, lora("b", 2)))
    do(engine.add_request("r", "p", None, lora("a", 1)))
    assert engine.core.paths == ["/a", "/b", "/a"]


def test_what_was_removed_is_asked_for_again(engine):
    do(engine.add_lora(lora("a", 1)))
    do(engine.remove_lora(1))
    do(engine.add_request("r", "p", None, lora("a", 1)))
    assert engine.core.paths == ["/a", "/a"] and engine.removed == [1]


def test_whoever_calls_the_workers_may_have_changed_what_they_hold(engine):
    do(engine.add_request("r", "p", None, lora_request=lora("a", 1)))
    assert do(engine.collective_rpc("lora_ext_trace")) == ["lora_ext_trace"]
    do(engine.add_request("r", "p", None, lora_request=lora("a", 1)))
    assert len(engine.core.asked) == 1
    for method in ("add_lora", len):
        assert do(engine.collective_rpc(method, args=(1,))) == [method]
        do(engine.add_request("r", "p", None, lora_request=lora("a", 1)))
    assert len(engine.core.asked) == 3


def test_another_adapter_under_the_id_is_the_cores_to_judge(engine):
    do(engine.add_request("r", "p", None, lora("a", 1)))
    do(engine.add_request("r", "p", None, lora("b", 1)))
    assert engine.core.paths == ["/a", "/b"]


def test_a_replacement_is_done_once_and_the_request_goes_on_without(engine):
    for args, kwargs in (
        (("r", "p", None, lora("a", 1, True)), {}),
        (("r", "p", None), {"lora_request": lora("a", 1, True)}),
        (("r", SimpleNamespace(lora_request=lora("a", 1, True)), None), {}),
    ):
        do(engine.add_request(*args, **kwargs))
        prompt, given = engine.added[-1]
        assert not (given or prompt.lora_request).load_inplace
    assert engine.core.paths == ["/a"] * 3


def test_a_refused_adapter_is_its_requests_error(engine):
    engine.core.errors["/a"] = AdapterError("not_finite", "NaN in it")
    for _ in range(2):
        with pytest.raises(AdapterError) as caught:
            do(engine.add_request("r", "p", None, lora("a", 1)))
        assert caught.value.code == "not_finite" and engine.added == []
        if isinstance(engine, AsyncEngine):
            assert isinstance(caught.value, RefusedRequest)
            assert caught.value.http_status == 400
    assert len(engine.core.asked) == 2


def test_pin_errors_are_typed(engine):
    with pytest.raises(AdapterError) as caught:
        do(engine.pin_lora(1))
    assert caught.value.code == "slots_pinned"


def test_versions_are_those_of_the_last_load(engine):
    do(engine.add_lora(lora("a", 1)))
    do(engine.add_lora(lora("a", 1, True)))
    assert [Admitted.of(engine).version(i) for i in (1, 2)] == ["v2", ""]


def test_tensors(engine):
    first = do(engine.add_adapter("mine", TENSORS, CONFIG))
    second = do(engine.add_adapter("mine", TENSORS, CONFIG))
    other = do(engine.add_adapter("yours", TENSORS, CONFIG, {"top_k": 2}))
    assert first.lora_int_id == second.lora_int_id != other.lora_int_id
    assert min(first.lora_int_id, other.lora_int_id) >= MEMORY_IDS
    assert max(first.lora_int_id, other.lora_int_id) < 2**31  # vLLM keeps ids in int32
    assert not first.load_inplace and first.lora_name == "mine"
    assert all(request.load_inplace for request, _ in engine.core.asked)
    tensors, config, settings = engine.core.asked[-1][1]
    assert isinstance(tensors, bytes) and (config, settings) == (CONFIG, {"top_k": 2})
    do(engine.add_request("r", "p", None, first))
    assert len(engine.core.asked) == 3


def test_the_next_version_and_the_one_before(engine):
    first = do(engine.add_adapter("mine", TENSORS, CONFIG))
    assert engine.adapter_version(first) == "v1"
    do(engine.add_adapter("mine", TENSORS, CONFIG, expected_version="v1"))
    assert engine.core.expected == [None, "v1"] and engine.adapter_version(first) == "v2"
    do(engine.add_request("r", "p", SamplingParams(), first))
    assert engine.params.extra_args == {"lora_ext": {"version": "v2"}}
    back = do(engine.roll_back_adapter(first, "v1", "v2"))
    assert back.lora_path == "/v1" and engine.adapter_version(back) == "v1"
    do(engine.add_request("r", "p", SamplingParams(), back))
    assert engine.params.extra_args == {"lora_ext": {"version": "v1"}}
    assert len(engine.core.asked) == 2, "the core is not asked again"


def test_two_names_that_meet_in_one_id(engine):
    first = do(engine.add_adapter("mine", TENSORS, CONFIG))
    engine.core.taken.add(first.lora_int_id)
    assert do(engine.add_adapter("mine", TENSORS, CONFIG)).lora_int_id == first.lora_int_id + 1
    engine.core.taken = {first.lora_int_id + i for i in range(20)}
    with pytest.raises(AdapterError) as caught:
        do(engine.add_adapter("mine", TENSORS, CONFIG))
    assert caught.value.code == "id_in_use"


def test_bad_tensors_are_refused(engine):
    name = do(engine.add_adapter("mine", TENSORS, CONFIG)).lora_path
    engine.core.errors[name] = AdapterError("not_finite", "NaN in it")
    with pytest.raises(AdapterError) as caught:
        do(engine.add_adapter("mine", TENSORS, CONFIG))
    assert caught.value.code == "not_finite"


def test_without_lora_nothing_is_asked(engine):
    engine.vllm_config.lora_config = None
    do(engine.add_request("r", "p", None, lora("a", 1)))
    assert engine.core.asked == [] and len(engine.added) == 1
    with pytest.raises(AdapterError) as caught:
        do(engine.add_adapter("mine", TENSORS, CONFIG))
    assert caught.value.code == "bad_settings"
