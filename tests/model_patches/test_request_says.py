"""From what a request says to what it is sent with, with a core that only takes notes."""

from __future__ import annotations

import asyncio
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams

from vllm_lora_ext.conditions.column import Column
from vllm_lora_ext.conditions.recipe import DERIVED_IDS, Recipe
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.admission import _patch_async, _patch_sync
from vllm_lora_ext.model_patches.core_calls import ADD
from vllm_lora_ext.model_patches.gate_pass import GATE
from vllm_lora_ext.model_patches.refused import RefusedRequest

ALORA = (Column(invocation=(7, 8)),)
MMLORA = (Column(modalities=("image",)), Column(modalities=("text",)))
LIBRARY = (Column(expert="math"), Column(expert="code"))
NOTHING: dict[str, Any] = {"columns": (), "user": None, "instruction": False}
ADAPTERS: dict[str, dict[str, Any]] = {
    "a": {}, "b": {}, "c": {},
    "alora": {"columns": ALORA}, "mm": {"columns": MMLORA}, "library": {"columns": LIBRARY},
    "reclora": {"user": 3}, "wavllm": {"instruction": True},
}  # fmt: skip


class Core:
    """Holds whatever it is asked to; `versions` are those of folders."""

    def __init__(self) -> None:
        self.versions = dict.fromkeys(ADAPTERS, "v1")
        self.added: list[LoRARequest] = []
        self.held: dict[int, str] = {}  # id → path
        self.gates: list[tuple[int, ...]] = []
        self.refuse: list[AdapterError] = []

    def answer(self, method: str, request: LoRARequest, *args: Any) -> dict[str, Any]:
        if method == GATE:
            self.gates.append(tuple(args[1]))
            return {"gate": "AACAPw==", "computed": True}
        assert method == ADD
        self.added.append(request)
        if request.lora_int_id >= DERIVED_IDS:
            return self._derive(request)
        self.held[request.lora_int_id] = request.lora_path
        said = {**NOTHING, **ADAPTERS[request.lora_name]}
        understands = {**said, "columns": [column.to_dict() for column in said["columns"]]}
        version = f"{request.lora_name}-{self.versions[request.lora_name]}"
        return {
            "version": version, "path": request.lora_path, "evicted": [],
            "understands": understands, "read": True,
        }  # fmt: skip

    def _derive(self, request: LoRARequest) -> dict[str, Any]:
        if self.refuse:
            return {"error": str(self.refuse.pop())}
        if self.held.get(request.lora_int_id, request.lora_path) != request.lora_path:
            return {"error": str(AdapterError("id_in_use", "taken"))}
        recipe = Recipe.parse(request.lora_path)
        for part in recipe.parts:
            if part.version != f"{part.name}-{self.versions[part.name]}":
                return {"error": str(AdapterError("adapter_changed", "replaced"))}
        self.held[request.lora_int_id] = request.lora_path
        understands = {"columns": [], "user": None, "instruction": False}
        return {
            "version": recipe.version, "path": request.lora_path, "evicted": [],
            "understands": understands, "read": True,
        }  # fmt: skip

    @property
    def recipes(self) -> list[Recipe]:
        derived = [r for r in self.added if r.lora_int_id >= DERIVED_IDS]
        return [Recipe.parse(request.lora_path) for request in derived]


class SyncEngine:
    """Has the methods that are wrapped, and stock's signatures."""

    def __init__(self, lora: bool = True) -> None:
        self.core, self.sent = Core(), []
        self.vllm_config = SimpleNamespace(
            lora_config=SimpleNamespace() if lora else None,
            additional_config={"lora_ext": {"max_request_adapters": 3}},
            model_config=SimpleNamespace(max_model_len=64, get_vocab_size=lambda: 100),
        )
        encode = lambda text, add_special_tokens: [ord(c) for c in text]  # noqa: E731
        self.renderer = SimpleNamespace(tokenizer=SimpleNamespace(encode=encode))
        self.engine_core = SimpleNamespace(call_utility=self.core.answer)

    def add_request(self, request_id: str, prompt: Any, params: Any, lora_request: Any = None):
        self.sent.append((params, lora_request))

    def add_lora(self, lora_request: LoRARequest) -> bool:
        raise AssertionError("not without LoRA")

    def remove_lora(self, lora_id: int) -> bool:
        return True

    def pin_lora(self, lora_id: int) -> bool:
        return True

    def collective_rpc(self, method: str) -> Any:
        raise AssertionError("nobody calls the workers")


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

    async def collective_rpc(self, method: str) -> Any:
        return super().collective_rpc(method)


def do(result: Any) -> Any:
    return asyncio.run(result) if inspect.iscoroutine(result) else result


def lora(name: str) -> LoRARequest:
    return LoRARequest(name, 1 + list(ADAPTERS).index(name), f"/{name}")


@pytest.fixture(params=["sync", "async"])
def engine(request: pytest.FixtureRequest) -> Any:
    base = SyncEngine if request.param == "sync" else AsyncEngine
    methods = {n: f for n, f in vars(base).items() if inspect.isfunction(f)}
    cls = type("Engine", (base,), methods)  # a class of its own to wrap
    (_patch_sync if request.param == "sync" else _patch_async)(cls)
    cls.__init__ = base.__init__
    made = cls()
    for name in ADAPTERS:
        do(made.add_lora(lora(name)))
    made.core.added.clear()
    return made


def send(engine: Any, said: Any, model: str | None = None, **extra: Any) -> tuple[Any, Any]:
    """The adapter that the request is sent with, and the plan that it carries."""
    args = {**extra, **({} if said is None else {"lora_ext": said})}
    params = SamplingParams(extra_args=args)
    do(engine.add_request("r", "p", params, None if model is None else lora(model)))
    assert params.extra_args == args, "the caller's own"
    sent, adapter = engine.sent[-1]
    plan = dict((sent.extra_args or {}).get("lora_ext") or {})
    assert bool(plan.pop("version", "")) == (adapter is not None)
    return adapter, plan or None


def refused(engine: Any, said: Any, model: str | None = None) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        send(engine, said, model)
    assert engine.sent == []
    if isinstance(engine, AsyncEngine):
        assert isinstance(caught.value, RefusedRequest)
        assert caught.value.http_status == 400
    return caught.value


def parts(adapter: LoRARequest) -> list[tuple[str, float]]:
    return [(part.name, part.scale) for part in Recipe.parse(adapter.lora_path).parts]


def test_who_says_nothing_is_sent_as_it_is(engine):
    assert send(engine, None) == (None, None)
    assert send(engine, {}) == (None, None)
    assert send(engine, {"adapters": []}) == (None, None)
    assert send(engine, None, "a") == (lora("a"), None)
    assert send(engine, {}, "alora") == (lora("alora"), None)
    assert engine.core.added == []


def test_one_whole_adapter_is_that_adapter(engine):
    adapter, plan = send(engine, {"adapters": [{"name": "b", "scale": 1}]})
    assert (adapter, adapter.lora_int_id, plan) == (lora("b"), lora("b").lora_int_id, None)
    assert engine.core.added == []


def test_constant_mixes_are_one_derived_adapter_in_any_order(engine):
    both = [{"name": "b", "scale": 0.5}, {"name": "a"}]
    first, plan = send(engine, {"adapters": both})
    second, _ = send(engine, {"adapters": both[::-1]})
    assert plan is None
    assert first.lora_int_id == second.lora_int_id >= DERIVED_IDS
    assert parts(first) == [("a", 1.0), ("b", 0.5)]
    assert len(engine.core.added) == 1
    other, _ = send(engine, {"adapters": [{"name": "b", "scale": 0.25}, {"name": "a"}]})
    assert other.lora_int_id != first.lora_int_id


def test_what_adds_nothing_is_left_out(engine):
    off = {"name": "b", "scale": 0}
    assert send(engine, {"adapters": [off]}) == (None, None)
    assert send(engine, {"adapters": [off, {"name": "a"}]}) == (lora("a"), None)


def test_spans_are_columns_and_scales_with_them(engine):
    said = [{"name": "b", "scale": 0.5, "spans": [[3, None]]}, {"name": "a", "scale": 2}]
    adapter, plan = send(engine, {"adapters": said})
    assert parts(adapter) == [("a", 1.0), ("b", 1.0)]
    assert Recipe.parse(adapter.lora_path).by_row
    assert plan == {"columns": [{"scale": 2.0}, {"scale": 0.5, "spans": [[3, None]]}]}
    other, _ = send(engine, {"adapters": [{"name": "a", "spans": [[0, 1]]}, {"name": "b"}]})
    assert other.lora_int_id == adapter.lora_int_id, "spans and scales are not in the adapter"


def test_a_modality_is_a_column(engine):
    said = {
        "adapters": [{"name": "a", "modality": "image"}, {"name": "b", "modality": "text"}],
        "modality_spans": {"image": [[2, 4]]},
    }
    _, plan = send(engine, said)
    assert plan == {
        "columns": [{"modalities": ["image"]}, {"modalities": ["text"]}],
        "modality_spans": {"image": [[2, 4]]},
    }


def test_an_adapters_own_columns_follow_its_factor(engine):
    _, plan = send(engine, {"adapters": [{"name": "mm", "spans": [[1, 2]]}, {"name": "alora"}]})
    own = [column.to_dict() for column in (*ALORA, Column(spans=((1, 2),)), *MMLORA)]
    assert plan == {"columns": [{}, *own]}
    _, plan = send(engine, {"adapters": [{"name": "alora"}, {"name": "a"}]})
    assert plan == {"columns": [column.to_dict() for column in ALORA]}


def test_positions_of_other_inputs_for_an_adapter_of_them(engine):
    adapter, plan = send(engine, {"modality_spans": {"image": [[2, 4]]}}, "mm")
    assert adapter == lora("mm")
    assert plan["columns"] == [column.to_dict() for column in MMLORA]
    assert plan["modality_spans"] == {"image": [[2, 4]]}


@pytest.mark.parametrize("gates", [{"math": 0.25}, {"0": 0.25}, {"math": 0.25, "1": 0}])
def test_gates_are_the_scales_of_columns(engine, gates):
    adapter, plan = send(engine, {"gates": gates}, "library")
    assert adapter == lora("library")
    assert plan["columns"] == [{"scale": 0.25, "expert": "math"}, {"scale": 0.0, "expert": "code"}]


def test_a_user_makes_an_adapter(engine):
    adapter, plan = send(engine, {"user": [0.1, 2, 3]}, "reclora")
    recipe = Recipe.parse(adapter.lora_path)
    assert recipe.user == pytest.approx((0.1, 2.0, 3.0)) and recipe.user[0] != 0.1, "float32"
    assert plan is None and parts(adapter) == [("reclora", 1.0)]
    again, _ = send(engine, {"adapters": [{"name": "reclora"}], "user": [0.1, 2, 3]})
    assert again.lora_int_id == adapter.lora_int_id
    other, _ = send(engine, {"user": [0.1, 2, 4]}, "reclora")
    assert other.lora_int_id != adapter.lora_int_id
    assert len(engine.core.added) == 2


def test_an_instruction_makes_an_adapter_and_its_gate_is_asked_for_once(engine):
    for said in ({"instruction": "hi"}, {"instruction": {"ids": [34, 65]}}, {"instruction": "hi"}):
        if said["instruction"] == "hi":
            engine.vllm_config.model_config.get_vocab_size = lambda: 200
        adapter, _ = send(engine, said, "wavllm")
        assert Recipe.parse(adapter.lora_path).gate == "AACAPw=="
    assert engine.core.gates == [tuple(map(ord, '"hi"')), (34, 65)]


def test_a_trace_is_asked_for_as_ever(engine):
    for params in (SamplingParams(extra_args={"lora_ext": {"trace": True}}),):
        do(engine.add_request("r", "p", params, lora("a")))
        said = {"lora_ext": {"version": "a-v1"}}
        assert engine.sent[-1][0].extra_args == {"lora_ext_trace": True, **said}
    send(engine, {"trace": False}, "a")
    assert engine.sent[-1][0].extra_args == said


def test_parameters_of_pooling_requests(engine):
    params = PoolingParams(extra_kwargs={"lora_ext": {"modality_spans": {"image": [[0, 1]]}}})
    do(engine.add_request("r", "p", params, lora("mm")))
    sent = engine.sent[-1][0]
    assert sent is not params and set(sent.extra_kwargs["lora_ext"]) == {
        "columns", "modality_spans", "version"
    }  # fmt: skip
    with pytest.raises(AdapterError, match="not traced"):
        params = PoolingParams(extra_kwargs={"lora_ext": {"trace": True}})
        do(engine.add_request("r", "p", params, lora("a")))


def test_json_text_is_the_same(engine):
    adapter, _ = send(engine, '{"adapters": [{"name": "b"}]}')
    assert adapter == lora("b")


def test_other_arguments_stay(engine):
    send(engine, {"adapters": [{"name": "b"}]}, mine=3)
    assert engine.sent[-1][0].extra_args == {"mine": 3, "lora_ext": {"version": "b-v1"}}


@pytest.mark.parametrize(
    ("said", "model", "words"),
    [
        ({"adapters": [{"name": "x"}]}, None, "lora_ext.adapters[0].name is no loaded adapter"),
        ({"adapters": [{"name": "a"}]}, "b", "beside a model that is not the base model; seen: b"),
        ({"adapters": [{"name": "a"}] * 4}, None, "max_request_adapters 3"),
        (
            {"adapters": [{"name": "a", "spans": [[64, None]]}]},
            None,
            "spans[0] is outside",
        ),
        ({"user": [1, 2, 3]}, "a", "lora_ext.user has no use here"),
        ({"user": [1, 2, 3]}, None, "lora_ext.user has no use here"),
        ({"user": [1, 2]}, "reclora", "not of the length that reclora needs; seen: 2; allowed: 3"),
        ({}, "reclora", "lora_ext.user is missing: adapter reclora needs it"),
        (None, "reclora", "lora_ext.user is missing"),
        ({"gates": {"math": 1}}, "a", "lora_ext.gates has no use here"),
        (None, "library", "lora_ext.gates is missing: adapter library needs it"),
        ({"gates": {"x": 1}}, "library", "lora_ext.gates.x is no expert of library"),
        ({"gates": {"2": 1}}, "library", "lora_ext.gates.2 is no expert of library"),
        ({"gates": {"000000019": 1}}, "library", "lora_ext.gates.000000019 is no expert"),
        ({"gates": {"0" * 8 + "5" * 400: 1}}, "library", "is no expert of library"),
        ({"gates": {"x": 10001}}, "library", "lora_ext.gates.x is wrong"),
        ({"gates": {"math": 1, "0": 1}}, "library", "lora_ext.gates.0 is said twice"),
        ({"instruction": "hi"}, "a", "lora_ext.instruction has no use here"),
        (None, "wavllm", "lora_ext.instruction is missing"),
        ({"instruction": {"ids": [100]}}, "wavllm", "lora_ext.instruction.ids are no tokens"),
        ({"instruction": {"ids": [1] * 65}}, "wavllm", "instruction is longer than the model's"),
        ({"modality_spans": {"image": [[0, 1]]}}, "alora", "lora_ext.modality_spans has no use"),
        ({"columns": []}, "alora", "lora_ext.columns is unknown"),
    ],
)
def test_what_does_not_fit_is_refused(engine, said, model, words):
    error = refused(engine, said, model)
    assert error.code == "bad_value"
    assert words in error.text


def test_a_name_is_known_until_it_is_removed(engine):
    do(engine.remove_lora(lora("a").lora_int_id))
    assert refused(engine, {"adapters": [{"name": "a"}]}).code == "bad_value"


def test_an_adapter_that_was_replaced_meanwhile_is_looked_at_once_more(engine):
    both = {"adapters": [{"name": "a"}, {"name": "b"}]}
    engine.core.versions["a"] = "v2"  # another front end did it
    adapter, _ = send(engine, both)
    assert [part.version for part in Recipe.parse(adapter.lora_path).parts] == ["a-v2", "b-v1"]
    engine.core.refuse = [AdapterError("adapter_changed", "again and again") for _ in range(9)]
    with pytest.raises(AdapterError) as caught:
        send(engine, {"adapters": [{"name": "a"}, {"name": "c"}]})
    assert caught.value.code == "adapter_changed" and len(engine.core.refuse) == 7


def test_two_recipes_that_meet_in_one_id(engine):
    both = {"adapters": [{"name": "a"}, {"name": "b"}]}
    first, _ = send(engine, both)
    do(engine.remove_lora(first.lora_int_id))
    engine.core.held[first.lora_int_id] = "another"
    second, _ = send(engine, both)
    assert second.lora_int_id == first.lora_int_id + 1


def test_what_cannot_be_made_is_its_requests_error(engine):
    engine.core.refuse = [AdapterError("rank_too_large", "ranks 9 + 9")]
    assert refused(engine, {"adapters": [{"name": "a"}, {"name": "b"}]}).code == "rank_too_large"


def test_without_lora_nothing_can_be_said(engine):
    engine.vllm_config.lora_config = None
    assert send(engine, {}) == (None, None)
    with pytest.raises(AdapterError) as caught:
        send(engine, {"adapters": [{"name": "a"}]})
    assert caught.value.code == "bad_settings"
