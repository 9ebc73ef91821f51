"""Settings are checked where an engine's configuration is made, before a weight is read."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import vllm.plugins
from vllm.config import KVTransferConfig, LoRAConfig
from vllm.engine.arg_utils import EngineArgs

from vllm_lora_ext import plugin
from vllm_lora_ext.adapters import registry
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging import methods as merge_methods
from vllm_lora_ext.model_patches import check, config

BASE = Path(__file__).parents[1] / "fixtures" / "bases" / "base_llama"
Start = Callable[..., Any]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    """The engine's own way to a configuration; of the plugin only what a test puts there."""
    monkeypatch.setattr(vllm.plugins, "plugins_loaded", True)
    monkeypatch.setattr(EngineArgs, "create_engine_config", EngineArgs.create_engine_config)

    def create(section: object = None, headless: bool = False, **options: Any) -> Any:
        args = {
            "model": str(BASE), "skip_tokenizer_init": True, "dtype": "float32",
            "max_model_len": 64, "enable_lora": True, "max_lora_rank": 8,
            "additional_config": {"lora_ext": section},
        }  # fmt: skip
        return EngineArgs(**(args | options)).create_engine_config(headless=headless)

    return create


@pytest.fixture
def checked(start: Start) -> Start:
    config.apply()
    return start


@pytest.mark.parametrize("lora", [True, False])
def test_an_unknown_setting_ends_the_start_before_the_model_is_looked_at(
    checked: Start, lora: bool, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match="no setting named bogus") as caught:
        checked({"bogus": 1}, model=str(tmp_path), enable_lora=lora)
    assert caught.value.code == "bad_settings"


@pytest.mark.parametrize("inside", [False, True])
def test_a_connector_that_knows_kv_by_tokens_only(checked: Start, inside: bool) -> None:
    """Also where it is one of several. Without LoRA it may stay."""
    options: dict[str, Any] = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    if inside:
        several = {"connectors": [options]}
        options = options | {"kv_connector": "MultiConnector", "kv_connector_extra_config": several}
    with pytest.raises(AdapterError, match="by the tokens alone") as caught:
        checked(kv_transfer_config=KVTransferConfig(**options))
    assert caught.value.code == "bad_settings"
    checked(kv_transfer_config=KVTransferConfig(**options), enable_lora=False)


def test_good_settings_give_the_configuration(checked: Start) -> None:
    made = checked({"max_router_rows": 4, "trace": True})
    assert config.check_config(made, made.lora_config).max_router_rows == 4
    assert config.check_config(made, made.lora_config) is config.check_config(
        made, made.lora_config
    )  # parsed once


@pytest.mark.parametrize(
    ("section", "options", "words"),
    [
        ({"trace": True}, {"fully_sharded_loras": True}, ["trace", "--fully-sharded-loras"]),
        ({"triton": True}, {}, ["triton", "seen: cpu"]),
    ],
)
def test_what_does_not_go_with_the_engines_options(
    checked: Start, section: dict[str, Any], options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(AdapterError) as caught:
        checked(section, **options)
    assert caught.value.code == "bad_settings"
    assert all(word in caught.value.text for word in words)
    checked(section, **options, enable_lora=False)  # asks nothing of the plugin


def test_folders_of_the_front_end_need_not_exist_on_workers(checked: Start, tmp_path: Path) -> None:
    section = {"merge": {"adapters": {"a": str(tmp_path / "here")}}}
    checked(section, headless=True)
    with pytest.raises(AdapterError, match=r"merge\.adapters\.a is wrong .* does not exist"):
        checked(section)
    (tmp_path / "here").mkdir()
    checked(section)


@pytest.mark.parametrize("what", ["reader", "method"])
def test_a_package_that_brings_something_broken(
    checked: Start, installed: Callable[..., None], what: str, tmp_path: Path
) -> None:
    group = {"reader": registry.ENTRY_POINTS, "method": merge_methods.ENTRY_POINTS}[what]
    section = {"merge": {"adapters": {"a": str(tmp_path)}}}
    checked(section)
    installed("broken_package", "raise RuntimeError('no such device')", group)
    with pytest.raises(AdapterError, match="no such device") as caught:
        checked(section)
    assert caught.value.code == f"bad_{what}"
    checked(section, enable_lora=False)


def test_an_unknown_vllm_starts_without_lora_only(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    changed = check.Finding("step-map", "vllm.lora.x", "changed", "sha256 differs", 1)
    monkeypatch.setattr(check, "check_tree", lambda root: [changed])
    monkeypatch.setattr(LoRAConfig, "__init__", LoRAConfig.__init__)
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.delenv("VLLM_LORA_EXT_UNCHECKED", raising=False)
    logging.getLogger("vllm").propagate = True  # vLLM turns it off once it is imported
    with caplog.at_level(logging.WARNING, "vllm.lora_ext"):
        plugin.register()
        plugin.register()
    (record,) = set(caplog.records)
    assert "vllm.lora.x is changed" in record.getMessage()
    assert start(enable_lora=False).lora_config is None
    with pytest.raises(RuntimeError, match=r"vllm\.lora\.x is changed .*VLLM_LORA_EXT_DISABLE=1"):
        start()
