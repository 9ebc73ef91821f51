"""The plugin's metrics, in a registry's text as a server gives it out."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import prometheus_client
import pytest
from vllm.lora.request import LoRARequest

from scripts.dashboard import FILE, dashboard, metric_names
from vllm_lora_ext.conditions.recipe import DERIVED_IDS
from vllm_lora_ext.model_patches import adapters_http, driving, engine_metrics, metrics
from vllm_lora_ext.model_patches.request_steps import load_first

STATE: dict[str, Any] = {
    "slots": 4, "slots_used": 3, "resident_bytes": 100, "limit_bytes": 1000,
    "counts": {"steps": 5, "activations": 2, "bytes": 64, "seconds": 0.25,
               "adapters_evicted": 3, "derived_adapters_evicted": 1},
    "adapters": [
        {"residency": "slot", "system": "plain"}, {"residency": "slot", "system": "plain"},
        {"residency": "host", "system": "loramoe"},
    ],
    "experts": {"a": [0.5, 3.0]},
}  # fmt: skip


def value(name: str, **labels: str) -> float:
    found = prometheus_client.REGISTRY.get_sample_value(f"lora_ext:{name}", labels)
    assert found is not None, name
    return found


def test_the_engines_numbers():
    engine_metrics.show(STATE)
    before = value("activations_total")
    engine_metrics.show(STATE)
    assert value("activations_total") - before == 2
    assert value("adapters_evicted_total") >= 6
    assert (value("slots"), value("slots_used"), value("resident_bytes")) == (4, 3, 100)
    assert value("adapters", residency="slot", system="plain") == 2
    assert value("traced_expert_weight", adapter="a", expert="1") == 3
    engine_metrics.show({**STATE, "adapters": [], "experts": {}})
    samples = prometheus_client.REGISTRY.get_sample_value
    assert samples("lora_ext:adapters", {"residency": "slot", "system": "plain"}) is None
    assert samples("lora_ext:traced_expert_weight", {"adapter": "a", "expert": "1"}) is None


def test_what_front_ends_count():
    metrics.show()
    loads, derived = value("load_seconds_count"), value("derived_adapters_made_total")
    metrics.made(1, 0.5)
    metrics.made(DERIVED_IDS, 0.5)
    assert value("load_seconds_count") - loads == 1
    assert value("derived_adapters_made_total") - derived == 1
    metrics.refused("not_finite")
    before = value("refusals_total", code="not_finite")
    metrics.refused("not_finite")
    assert value("refusals_total", code="not_finite") - before == 1


@pytest.mark.parametrize("read", [True, False])
def test_a_load_is_counted_that_had_something_to_do(read):
    metrics.show()
    understands = {"columns": [], "user": None, "instruction": False}
    reply = {"version": "v", "path": "/a", "evicted": [], "read": read, "understands": understands}
    client = SimpleNamespace(call_utility=lambda method, *args: reply)
    before = value("load_seconds_count")
    driving.run(SimpleNamespace(engine_core=client), load_first([LoRARequest("a", 1, "/a")]))
    assert value("load_seconds_count") - before == read


def test_a_scrape_that_does_not_wait_loses_no_numbers(monkeypatch):
    """The core says once what it has counted."""
    monkeypatch.setattr(adapters_http, "_SCRAPE_S", 0.01)
    engine_metrics.show(STATE)
    before, calls = value("activations_total"), []

    async def scrapes() -> None:
        go_on = asyncio.Event()

        async def call(method: str, count: bool, engine: int) -> Any:
            calls.append(count)
            await go_on.wait()
            return STATE

        core = SimpleNamespace(_call_utility_async=call, core_engines=[0])
        config = SimpleNamespace(lora_config=object())
        engine = SimpleNamespace(engine_core=core, vllm_config=config)
        await adapters_http._refresh(engine)
        left = asyncio.create_task(adapters_http._refresh(engine))
        await asyncio.sleep(0)
        left.cancel()  # its client hung up
        assert value("activations_total") == before and calls == [True]
        go_on.set()
        await asyncio.sleep(0.01)
        assert value("activations_total") - before == 2, "it is shown when it is known"
        await adapters_http._refresh(engine)
        assert value("activations_total") - before == 4

    asyncio.run(scrapes())
    assert calls == [True, True]


OPERATIONS, ERRORS = (
    Path(__file__).parents[2] / "docs" / f"{n}.md" for n in ("operations", "errors")
)
ALERTS = {
    name for line in OPERATIONS.read_text(encoding="utf-8").splitlines()
    if "rate(" in line for name in re.findall(r"lora_ext:\w+", line)
}  # fmt: skip


@pytest.mark.parametrize(
    "name", sorted(ALERTS | {n for n in metric_names() if n.startswith("lora_ext:")})
)
def test_the_dashboard_and_the_alerts_ask_for_what_there_is(name):
    metrics.show()
    metrics.refused("not_found")
    engine_metrics.show(STATE)
    assert any(
        sample.name == name for family in prometheus_client.REGISTRY.collect()
        for sample in family.samples
    ), name  # fmt: skip


def test_the_alert_on_refusals_fires_for_what_somebody_has_to_mend():
    """And not for what trying again mends, nor for what another alert is for."""
    page = OPERATIONS.read_text(encoding="utf-8").replace("\\|", "|")
    (but,) = re.findall(r'rate\(lora_ext:refusals_total{code!~"([a-z_|]+)"', page)
    rows = re.findall(
        r"^\| `([a-z_]+)` \|.*\| (\d+) \|", ERRORS.read_text(encoding="utf-8"), re.MULTILINE
    )
    silent = {code for code, _ in rows if re.fullmatch(but, code)}
    assert silent == set(but.split("|")), "codes that there are"
    assert silent >= {
        code for code, status in rows if status in ("401", "403", "404", "429", "503")
    }
    assert silent >= {"adapter_changed", "version_conflict"}
    assert not silent & {code for code, status in rows if status in ("400", "500")}


def test_the_dashboard_is_written():
    import json

    assert json.loads(FILE.read_text()) == dashboard()
