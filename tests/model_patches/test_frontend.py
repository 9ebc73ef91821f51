"""The load route, mixes and refusals in vLLM's own server objects, with no engine behind them."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import vllm.entrypoints.openai.models.serving as stock_models
import vllm.entrypoints.serve.lora.api_router as lora_routes
import vllm.plugins.endpoint_plugins.interface as plugins
from fastapi import APIRouter, FastAPI
from pydantic import ValidationError
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest
from vllm.exceptions import VLLMError
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_lora_ext import plugin
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.adapters_http import RollbackRequest, UnloadRequest
from vllm_lora_ext.model_patches.admitted import Admitted
from vllm_lora_ext.model_patches.exchange import Exchanges
from vllm_lora_ext.model_patches.refused import RefusedRequest, status_of
from vllm_lora_ext.serving import from_lorax, parse
from vllm_lora_ext.serving.service import Entry

plugin.register()


class Engine:
    """An `EngineClient` that loads nothing."""

    def __init__(self, settings: dict[str, Any] | None = None, servers: int = 1) -> None:
        self.vllm_config = SimpleNamespace(
            additional_config={"lora_ext": settings} if settings else {},
            lora_config=SimpleNamespace(max_lora_rank=16, lora_dtype="torch.float32"),
            parallel_config=SimpleNamespace(_api_process_count=servers),
        )
        self.model_config = SimpleNamespace(model="base", max_model_len=64)
        self.renderer = self.input_processor = None
        self.loaded: list[Any] = []
        self.removed: list[int] = []
        self.error: Exception | None = None
        self.errored = False

    async def add_lora(self, request: Any) -> bool:
        if self.error is not None:
            raise self.error
        self.loaded.append(request)
        understands = {"columns": [], "user": None, "instruction": False}
        version = f"v{len(self.loaded)}"
        reply = {"version": version, "evicted": [], "understands": understands}
        Admitted.of(self).loaded(request, reply)
        return True

    async def remove_lora(self, lora_id: int) -> bool:
        self.removed.append(lora_id)
        return True


def models_of(engine: Engine) -> Any:
    return OpenAIServingModels(engine, [BaseModelPath("base", "/base")])


def load(models: Any, name: str, path: str, inplace: bool = False) -> Any:
    request = LoadLoRAAdapterRequest(lora_name=name, lora_path=path, load_inplace=inplace)
    return asyncio.run(models.load_lora_adapter(request))


def unload(models: Any, name: str, expected: str | None = None) -> Any:
    request = UnloadRequest(lora_name=name, expected_version=expected)
    return asyncio.run(models.unload_lora_adapter(request))


def roots(models: Any) -> list[str]:
    cards = asyncio.run(models.show_available_models()).data
    return [card.root for card in cards if card.parent is not None]


@pytest.mark.parametrize(
    ("code", "status"),
    [("not_finite", 400), ("not_found", 404), ("path_not_allowed", 403), ("slots_pinned", 409),
     ("host_cache_full", 409), ("load_failed", 500), ("overflow", 400), ("router_too_large", 400)],
)  # fmt: skip
def test_a_refused_load_keeps_code_and_status(code, status):
    engine = Engine()
    engine.error = AdapterError(code, "no", seen="x")
    answer = load(models_of(engine), "a", "/a")
    assert isinstance(answer, ErrorResponse)
    assert (answer.error.type, answer.error.code, answer.error.param) == (code, status, "lora_path")


def test_other_errors_are_stocks():
    engine = Engine()
    engine.error = RuntimeError("something else")
    assert load(models_of(engine), "a", "/a").error.type == "InternalServerError"


def test_a_load_s_error_names_the_path_that_was_sent_and_no_other():
    engine = Engine()
    engine.error = OSError(13, "no", "/data/a/x", None, "/scratch/store/7")
    message = load(models_of(engine), "a", "/data/a").error.message
    assert message.endswith("no: '/data/a/x' -> '<path>'")


def test_a_load_whose_engine_dies_is_told_so():
    engine = Engine()
    engine.error, engine.errored = RuntimeError("EngineCore encountered an issue"), True
    answer = load(models_of(engine), "a", "/a")
    assert (answer.error.type, answer.error.code) == ("engine_dead", 503)
    assert "a" not in models_of(engine).lora_requests


def test_the_path_is_shown_as_it_was_given_and_replaced_once():
    engine = Engine()
    models = models_of(engine)
    for spelling in ("/a", "/a/", "/a/.", "a"):
        assert isinstance(load(models, "a", spelling, inplace=True), str)
        assert roots(models) == [spelling]
        assert engine.loaded[-1].load_inplace and not models.lora_requests["a"].load_inplace
    assert len({request.lora_int_id for request in engine.loaded}) == 1


def test_a_mix_knows_the_content_that_it_is_made_of():
    engine = Engine({"merge": {}})
    models = models_of(engine)
    load(models, "a", "/a")
    before = models._lora_ext_front.adapters()
    load(models, "a", "/a", inplace=True)
    after = models._lora_ext_front.adapters()
    assert (before, after) == ({"a": ("/a", "v1")}, {"a": ("/a", "v2")})
    unload(models, "a")
    assert models._lora_ext_front.adapters() == {} and engine.removed == [1]


def test_an_unload_takes_away_no_other_version_than_it_means():
    engine = Engine()
    models = models_of(engine)
    load(models, "a", "/a")
    load(models, "a", "/a", inplace=True)
    for other in ("v1", ""):
        answer = unload(models, "a", other)
        assert (answer.error.type, answer.error.code) == ("version_conflict", 409)
        assert answer.error.param == "expected_version" and "v2" in answer.error.message
        assert models.lora_requests["a"].lora_path == "/a" and engine.removed == []
    assert isinstance(unload(models, "a", "v2"), str)
    assert (dict(models.lora_requests), engine.removed) == ({}, [1])
    assert unload(models, "a", "v2").error.code == 404


def test_sagemakers_unload_compares_nothing():
    """Its body is a namespace that stock's route fills with the name."""
    engine = Engine()
    models = models_of(engine)
    load(models, "a", "/a")
    request = SimpleNamespace(lora_name="a")
    assert isinstance(asyncio.run(models.unload_lora_adapter(request)), str)
    assert engine.removed == [1]


def test_the_servers_openapi_shows_what_loads_and_unloads_compare(monkeypatch):
    monkeypatch.setattr(lora_routes, "router", APIRouter())
    app = FastAPI()
    lora_routes._attach_router(app)
    schema = app.openapi()
    for route in ("load", "unload"):
        post = schema["paths"][f"/v1/{route}_lora_adapter"]["post"]
        name = post["requestBody"]["content"]["application/json"]["schema"]["$ref"].split("/")[-1]
        assert "expected_version" in schema["components"]["schemas"][name]["properties"]


def test_an_unload_that_has_waited_takes_away_what_it_finds():
    """Each unload behind a load of its name: the engine keeps none of them."""
    engine = Engine()
    models = models_of(engine)

    async def queue() -> list[Any]:
        async with models.lora_resolver_lock["a"]:
            calls = []
            for number in range(3):
                body = LoadLoRAAdapterRequest(lora_name="a", lora_path=f"/{number}")
                calls.append(asyncio.create_task(models.load_lora_adapter(body)))
                await asyncio.sleep(0)
                body = UnloadRequest(lora_name="a", expected_version=f"v{number + 1}")
                calls.append(asyncio.create_task(models.unload_lora_adapter(body)))
                await asyncio.sleep(0)
        return await asyncio.gather(*calls)

    answers = asyncio.run(queue())
    assert all(isinstance(answer, str) for answer in answers), answers
    assert [request.lora_int_id for request in engine.loaded] == engine.removed == [1, 2, 3]
    assert not models.lora_requests


def test_an_unload_lets_go_of_no_recipe_that_is_loaded_while_the_engine_is_told():
    engine, done = Engine({"merge": {}}), []
    models = models_of(engine)
    load(models, "a", "/a")
    mixes = SimpleNamespace(unloaded=done.append)
    models._lora_ext_front.__dict__["mixes"] = mixes

    async def told(lora_id: int) -> bool:
        assert done == ["a"]
        return True

    engine.remove_lora = told
    assert isinstance(unload(models, "a"), str)


def test_a_reload_is_not_said_to_leave_stale_blocks(monkeypatch, caplog):
    """Stock's warning of them; blocks are keyed by content here."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO, "vllm")
    models = models_of(Engine())
    load(models, "a", "/a")
    load(models, "a", "/a", inplace=True)
    heard = dict.fromkeys(caplog.records)  # after an engine in this process, pytest hears it twice
    said = [r.getMessage() for r in heard if r.name == stock_models.__name__]
    assert said == ["Loaded new LoRA adapter: name 'a', path '/a'"] * 2


def test_the_log_names_what_a_load_was_refused_for_and_nothing_of_requests(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.WARNING, "vllm")
    engine = Engine()
    engine.error = AdapterError("not_finite", "NaN in a tensor")
    load(models_of(engine), "bad", "/bad")
    (line,) = [r.getMessage() for r in dict.fromkeys(caplog.records)]
    assert line.startswith("Refused LoRA adapter 'bad': ") and "NaN in a tensor" in line
    create_error_response(RefusedRequest(AdapterError("bad_value", "no", seen="x")))
    assert len(dict.fromkeys(caplog.records)) == 1


def test_mixes_by_name_need_one_front_end():
    with pytest.raises(AdapterError) as caught:
        models_of(Engine({"merge": {}}, servers=2))
    assert caught.value.code == "bad_settings"
    models_of(Engine(None, servers=2))


def test_a_missing_recipe_is_refused_before_the_engine(tmp_path):
    engine = Engine({"merge": {"store": str(tmp_path)}})
    answer = load(models_of(engine), "a", str(tmp_path / "none.yaml"))
    assert (answer.error.type, answer.error.code) == ("not_found", 404)
    assert engine.loaded == []


@pytest.mark.parametrize("place", ["/data/store/served/server-x/1", "/tmp/served/server-x/1"])
def test_a_recipe_that_the_engine_refuses_is_called_as_it_was_sent(tmp_path, place):
    engine = Engine({"merge": {"store": str(tmp_path)}})
    models, given_up = models_of(engine), []
    entry = Entry("", None, Path(place), sent="weekly.yaml")

    async def build(path: str) -> Any:
        return entry

    mixes = SimpleNamespace(build_recipe=build, discard=given_up.append)
    models._lora_ext_front.__dict__["mixes"] = mixes
    engine.error = AdapterError("not_found", "there is no adapter folder", seen=f"{place}/x")
    error = load(models, "a", "weekly.yaml").error
    assert error.type == "not_found" and given_up == [entry]
    assert "served" not in error.message and "server-x" not in error.message
    if place.startswith("/data"):  # else vLLM has masked it
        assert error.message.endswith("seen: weekly.yaml/x.")


def test_sagemakers_route_sends_no_pydantic_model(tmp_path):
    """But a namespace, which has no `model_copy`; its recipe is built, loaded and shown."""
    engine = Engine({"merge": {"store": str(tmp_path)}})
    models = models_of(engine)
    kept = SimpleNamespace(path=tmp_path / "merged")

    async def build(path: str) -> Any:
        return kept

    mixes = SimpleNamespace(
        build_recipe=build,
        loaded=lambda name, entry, version: None,
        made=lambda: {str(kept.path): "weekly.yaml"},
    )
    models._lora_ext_front.__dict__["mixes"] = mixes
    body = {"lora_name": "a", "load_inplace": False, "is_3d_lora_weight": False}
    request = SimpleNamespace(lora_path="weekly.yaml", expected_version="v0", **body)
    assert isinstance(asyncio.run(models.load_lora_adapter(request)), str)
    assert engine.loaded[0].lora_path == str(kept.path) and engine.loaded[0].load_inplace
    assert roots(models) == ["weekly.yaml"], "and not the server's own folder"
    assert request.lora_path == "weekly.yaml" and not request.load_inplace


def test_a_rollback_on_a_dead_engine_says_so():
    engine = Engine()
    models = models_of(engine)
    load(models, "a", "/a")

    async def dead(*args: Any) -> None:
        raise EngineDeadError

    engine.roll_back_adapter = dead
    answer = asyncio.run(models._lora_ext_front.roll_back("a", "v0", None))
    assert (answer.error.type, answer.error.code) == ("engine_dead", 503)


def test_a_rollback_without_the_token_waits_for_nothing_and_leaves_nothing(tmp_path):
    (tmp_path / "token").write_text("a" * 64)
    models = models_of(Engine({"admin_token_file": str(tmp_path / "token")}))
    codes = []

    async def app(*of_http: Any) -> None:
        async with models.lora_resolver_lock["loading"]:
            for name in ("loading", "b", "c"):
                call = models._lora_ext_front.roll_back(name, "v0", None)
                codes.append((await asyncio.wait_for(call, 5)).error.type)

    asyncio.run(Exchanges(app)({"type": "http", "headers": []}, None, None))
    assert codes == ["no_token"] * 3 and list(models.lora_resolver_lock) == ["loading"]


def test_a_rollback_of_what_is_not_loaded_leaves_nothing():
    models = models_of(Engine())
    answer = asyncio.run(models._lora_ext_front.roll_back("nobody", "v", None))
    assert (answer.error.type, answer.error.code) == ("not_found", 404)
    assert not models.lora_resolver_lock


def test_a_rollback_keeps_the_files_of_what_it_brings_back():
    engine = Engine()
    models, told = models_of(engine), []
    load(models, "a", "/a")
    mixes = SimpleNamespace(rolled_back=lambda *said: told.append(said))
    models._lora_ext_front.__dict__["mixes"] = mixes

    async def back(loaded: Any, version: str, expected: str | None) -> Any:
        return loaded

    engine.roll_back_adapter = back
    answer = asyncio.run(models._lora_ext_front.roll_back("a", "v0", None))
    assert isinstance(answer, str) and told == [("a", "v0")]


@pytest.mark.parametrize("allowed", [False, True])
def test_a_rollback_has_a_route_where_loads_have_one(monkeypatch, allowed):
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", str(int(allowed)))
    app = FastAPI()
    plugins.attach_endpoint_plugins(app, ("generate",))
    routes = {getattr(route, "path", "") for route in app.routes}
    assert ("/v1/lora_ext/rollback" in routes) is allowed and "/v1/lora_ext/adapters" in routes


def test_a_rollback_takes_no_field_that_it_does_not_know():
    with pytest.raises(ValidationError, match="expected_versoin"):
        RollbackRequest(lora_name="a", version="v", expected_versoin="w")


def test_a_folder_with_a_recipes_name_is_a_folder(tmp_path):
    engine, folder = Engine(), tmp_path / "folder.yaml"
    folder.mkdir()
    assert isinstance(load(models_of(engine), "a", str(folder)), str)
    assert engine.loaded[0].lora_path == str(folder)


class Request:
    """What a route hands on."""

    def __init__(self, model: str, **extra: Any) -> None:
        self.model, self.model_extra = model, extra


class MixesOnPaper:
    """In place of `serving.Mixes`: says yes, and shows what was served."""

    def __init__(self, front: Any) -> None:
        self.front, self.error, self.held = front, None, []

    def names(self) -> set[str]:
        return set()

    async def serve(self, mix: Any, holder: object) -> str:
        if self.error is not None:
            raise self.error
        loaded = await self.front.load(str(mix), Path("/mix"))
        self.front.show(str(mix), loaded)
        return str(mix)

    def hold(self, model: str, holder: object) -> None:
        self.held.append(model)


def serving(settings: dict[str, Any] | None) -> tuple[Engine, Any, Any]:
    engine = Engine(settings)
    models = models_of(engine)
    models._lora_ext_front.__dict__["mixes"] = MixesOnPaper(models._lora_ext_front)
    return engine, models, BaseServing(models, engine.model_config)


def test_a_mix_in_a_request_is_made_and_the_request_keeps_it():
    engine, models, server = serving({"merge": {}})
    request = Request("cat:b*0.4+a*0.6")
    assert asyncio.run(server._check_model(request)) is None
    name = str(parse("cat:b*0.4+a*0.6"))
    assert request.model == name and engine.loaded[0].lora_name == name
    given = models.lora_requests.pop(name)  # another takes its place while the prompt is read
    assert server._maybe_get_adapters(request).target.lora is given


def test_loraxs_spelling_is_a_mix_of_the_base_only():
    merged = {"ids": ["a", "b"], "weights": [0.5, 0.5], "merge_strategy": "linear"}
    _, _, server = serving({"merge": {}})
    request = Request("base", merged_adapters=merged)
    assert asyncio.run(server._check_model(request)) is None
    assert request.model == str(from_lorax(merged))
    answer = asyncio.run(server._check_model(Request("a", merged_adapters=merged)))
    assert (answer.error.type, answer.error.code) == ("bad_value", 400)


@pytest.mark.parametrize("name", ["cat:a+b", "cat:b+a", "svd[r=2]:a", "recipe:weekly"])
@pytest.mark.parametrize("how", [{"load_inplace": True}, {"expected_version": "v0"}, {}])
def test_a_load_does_not_take_over_the_name_of_a_mix(name, how):
    """In any spelling, and before the mix is asked for: it may be on its way."""
    engine, models, server = serving({"merge": {}})
    if name == "cat:a+b":
        assert asyncio.run(server._check_model(Request(name))) is None
    before, count = dict(models.lora_requests), len(engine.loaded)
    request = SimpleNamespace(
        lora_name=name, lora_path="/c", is_3d_lora_weight=False, **{"load_inplace": False, **how}
    )
    error = asyncio.run(models.load_lora_adapter(request)).error
    assert (error.type, error.code, error.param) == ("bad_value", 400, "lora_name")
    assert models.lora_requests == before and len(engine.loaded) == count


def test_other_names_with_signs_are_for_whoever_gives_them():
    _, models, server = serving({"merge": {}})
    for name in ("team:support", "cat:", "a+b", "team:a+b"):
        assert isinstance(load(models, name, "/a"), str)
        request = Request(name)
        assert asyncio.run(server._check_model(request)) is None and request.model == name
    assert isinstance(load(models_of(Engine()), "cat:a+b", "/a"), str), "no mixes by name here"


def test_a_mix_that_cannot_be_had_is_the_requests_error():
    _, models, server = serving({"merge": {}})
    models._lora_ext_front.mixes.error = AdapterError("merge_busy", "all in use")
    answer = asyncio.run(server._check_model(Request("cat:a+b")))
    assert (answer.error.type, answer.error.code) == ("merge_busy", 429)


def test_without_the_setting_a_mix_is_an_unknown_model():
    engine, _, server = serving(None)
    answer = asyncio.run(server._check_model(Request("cat:a+b")))
    assert (answer.error.code, engine.loaded) == (404, [])


def test_a_refused_request_has_its_status_and_code_in_stocks_own_handler():
    for code in ("not_found", "slots_pinned", "not_finite", "load_failed"):
        error = RefusedRequest(AdapterError(code, "no"))
        assert isinstance(error, VLLMError)  # what the server has a handler for
        answer = create_error_response(error)
        assert answer.error.code == status_of(code).value and f"lora_ext:{code}" in str(answer)
