"""The operator's token: which files hold one, and that the file counts as it is now."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.admin import TOKEN_HEADER, AdminToken
from vllm_lora_ext.settings import LoraExtSettings, read_token

FIRST, SECOND = "a" * 64, "b" * 64


def code_of(token: AdminToken, given: str | None = None) -> str:
    exchange: Any = SimpleNamespace(headers={} if given is None else {TOKEN_HEADER: given})
    try:
        token.check(exchange)
    except AdapterError as error:
        assert FIRST not in str(error) and SECOND not in str(error)
        return error.code
    return "may"


def test_the_file_is_read_anew_each_time(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{FIRST}\n")
    token = AdminToken(file)
    assert [code_of(token, FIRST), code_of(token, SECOND), code_of(token)] == [
        "may", "wrong_token", "no_token"
    ]  # fmt: skip
    file.write_text(SECOND)
    assert [code_of(token, FIRST), code_of(token, SECOND)] == ["wrong_token", "may"]
    for content in ("", "short", "\xe4" * 64, f"{FIRST} {SECOND}"):
        file.write_text(content)
        assert code_of(token, SECOND) == code_of(token, content) == "wrong_token"
    file.unlink()
    assert code_of(token, SECOND) == code_of(token, "") == "wrong_token"
    token.check(None)  # the server itself, for what it was started with


@pytest.mark.parametrize("content", [None, "", "a" * 15, "\xe4" * 64, f"{FIRST} {SECOND}"])
def test_a_server_starts_with_no_token_that_is_easily_guessed(
    tmp_path: Path, content: str | None
) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_text(content)
    section = {"lora_ext": {"admin_token_file": str(file)}}
    with pytest.raises(AdapterError) as refused:
        LoraExtSettings.from_additional_config(section).check_front_end()
    assert refused.value.code == "bad_settings" and "admin_token_file" in str(refused.value)
    assert FIRST not in str(refused.value)


def test_a_token_may_end_with_a_line(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f" {FIRST}\n")
    assert read_token(tmp_path / "token") == FIRST
