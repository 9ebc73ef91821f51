"""Texts without paths of the server."""

from __future__ import annotations

import pytest

from vllm_lora_ext.adapters.paths import without_paths
from vllm_lora_ext.errors import AdapterError


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("no: '/data/a b/c'", "no: '<path>'"), ('open("/data/x")', 'open("<path>")'),
        ("/scratch0/x: denied", "<path>: denied"), ("in /data/x.", "in <path>."),
        ("path=/data,/home2/y", "path=<path>,<path>"), ("at:/data/x", "at:<path>"),
        ("-> b'/data/x'", "-> b'<path>'"), ("(/data)", "(<path>)"), ("é /data/é ü", "é <path> ü"),
    ],
)  # fmt: skip
def test_absolute_paths_go(text, want):
    assert without_paths(text) == want


@pytest.mark.parametrize(
    "text",
    ["https://docs.vllm.ai/en/x", "send it to /v1/completions", "'/v1/models'", "rows/s", "1 / 2",
     "a/b/c", "</s>", "file:///data/x", "", "'/'", str(AdapterError("bad_value", "no", seen=1))],
)  # fmt: skip
def test_what_is_no_path_of_the_server_stays(text):
    assert without_paths(text) == text


@pytest.mark.parametrize("sent", ["/data/a", "/data/a/"])
def test_what_was_sent_stays_and_what_lies_below_it(sent):
    text = "'/data/a' '/data/a/x' '/data/ab' /data/a/y /data/b"
    want = "'/data/a' '/data/a/x' '<path>' /data/a/y <path>"
    assert without_paths(text, [sent, ""]) == want
