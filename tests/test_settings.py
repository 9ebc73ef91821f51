"""Settings of the operator: defaults, limits, and errors that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.settings import DISABLE_ENV, LoraExtSettings, disabled


def _read(**section: Any) -> LoraExtSettings:
    return LoraExtSettings.from_additional_config({"lora_ext": section})


@pytest.mark.parametrize("config", [None, {}, {"other": 1}, {"lora_ext": None}, {"lora_ext": {}}])
def test_defaults(config: dict[str, Any] | None) -> None:
    settings = LoraExtSettings.from_additional_config(config)
    assert settings.adapter_roots is None
    assert settings.max_router_rows is None
    assert settings.host_cache_mb is None
    assert settings.triton is None


@pytest.mark.parametrize("value", [True, False, None])
def test_triton_is_on_off_or_left_to_the_check(value: bool | None) -> None:
    assert _read(triton=value).triton is value


def test_how_the_engine_reads_adapters(tmp_path: Path) -> None:
    assert LoraExtSettings().reading() == {
        "roots": None, "pickle": None, "accept_config_keys": (), "parts": True
    }  # fmt: skip
    settings = _read(
        adapter_roots=[str(tmp_path)], pickle="weights_only", accept_config_keys=["a", "b"]
    )
    reading = settings.reading()
    assert reading["roots"] == settings.readable_roots() and tmp_path in reading["roots"]
    assert (reading["pickle"], reading["accept_config_keys"]) == ("weights_only", ("a", "b"))


@pytest.mark.parametrize(("rank", "rows"), [(8, 8), (64, 64), (256, 64)])
def test_router_rows_follow_the_rank(rank: int, rows: int) -> None:
    assert LoraExtSettings().router_rows(rank) == rows
    assert _read(max_router_rows=7).router_rows(rank) == 7


def test_roots_become_real_paths(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    settings = _read(adapter_roots=[str(tmp_path / "link")])
    assert settings.adapter_roots == ((tmp_path / "real").resolve(),)


def test_frozen_and_hashable() -> None:
    settings = LoraExtSettings()
    assert hash(settings) == hash(LoraExtSettings())
    with pytest.raises(ValueError, match="frozen"):
        settings.host_cache_mb = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"host_cache_mb": -1}, ["host_cache_mb", "seen: -1", "1 or more", "fix:"]),
        ({"host_cache_mb": "2048"}, ["host_cache_mb", "seen: 2048", "whole number"]),
        ({"host_cache_mb": True}, ["host_cache_mb", "seen: true"]),
        ({"max_router_rows": 0}, ["max_router_rows", "seen: 0", "1 to 512"]),
        ({"max_router_rows": 513}, ["max_router_rows", "seen: 513", "1 to 512"]),
        ({"adapter_roots": "/tmp"}, ["adapter_roots", "seen: /tmp", "list"]),
        ({"adapter_roots": [3]}, ["adapter_roots", "not a path"]),
        ({"adapter_roots": ["/no/such/folder"]}, ["adapter_roots", "does not exist"]),
        ({"adapter_roots": [__file__]}, ["adapter_roots", "is not a folder"]),
        ({"pickle": "yes"}, ["pickle", "seen: yes", "weights_only"]),
        ({"pickle": True}, ["pickle", "seen: true", "weights_only"]),
        ({"accept_config_keys": "x"}, ["accept_config_keys", "list"]),
        ({"accept_config_keys": [3]}, ["accept_config_keys", "list"]),
        ({"accept_config_keys": [""]}, ["accept_config_keys", "list"]),
        ({"triton": "auto"}, ["triton", "seen: auto", "true, false, or null"]),
        ({"triton": 1}, ["triton", "seen: 1"]),
        ({"host_cache": 5}, ["no setting named host_cache", "host_cache_mb", "fix:"]),
    ],
)
def test_bad_settings_name_field_value_limit_and_fix(
    section: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(AdapterError) as caught:
        _read(**section)
    assert caught.value.code == "bad_settings"
    for word in words:
        assert word in caught.value.text


@pytest.mark.parametrize("section", [[], "x", 3])
def test_section_must_be_an_object(section: object) -> None:
    with pytest.raises(AdapterError, match="not an object"):
        LoraExtSettings.from_additional_config({"lora_ext": section})


@pytest.mark.parametrize("value", ["1", "true", "YES", " yes "])
def test_off_switch_on(value: str) -> None:
    assert disabled({DISABLE_ENV: value})


@pytest.mark.parametrize("value", [None, "", "0", "false", "No"])
def test_off_switch_off(value: str | None) -> None:
    assert not disabled({} if value is None else {DISABLE_ENV: value})


def test_off_switch_refuses_what_it_does_not_know() -> None:
    with pytest.raises(AdapterError, match=DISABLE_ENV):
        disabled({DISABLE_ENV: "maybe"})
