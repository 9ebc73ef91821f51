"""Texts without paths of the server."""

from __future__ import annotations

import time

import pytest

from vllm_lora_ext.adapters.paths import without_paths
from vllm_lora_ext.errors import AdapterError


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("no: '/data/a b/c'", "no: '<path>'"), ('open("/data/x")', 'open("<path>")'),
        ("/scratch0/x: denied", "<path>: denied"), ("in /data/x.", "in <path>."),
        ("path=/data/x,/home2/y", "path=<path>,<path>"), ("at:/data/x", "at:<path>"),
        ("-> b'/data/x y'", "-> b'<path>'"), ("(/data/x), so", "(<path>), so"),
        ("é /data/é ü", "é <path> ü"), ("['/data']", "['<path>']"), ("</srv/x>", "<<path>>"),
        ("open //srv/x", "open <path>"), ("'//srv/x y'", "'<path>'"), ("'/v1-old/x'", "'<path>'"),
        ("/v10/x", "<path>"), ("/data/x(1)/y", "<path>"), ("[/data/x, 2]", "[<path>, 2]"),
        ("/a/b:/c/d", "<path>:<path>"), ("http://h/x, /data/x", "http://h/x, <path>"),
        ("can't open '/data/x y'", "can't open '<path>'"),
    ],
)  # fmt: skip
def test_absolute_paths_go(text, want):
    assert without_paths(text) == want


@pytest.mark.parametrize("name", ["it's/secret/x", 'a "b"/x', 'it\'s "b"/x', "a`b/x", "a b/x"])
def test_what_python_shows_of_a_path_goes_whole(name):
    error = PermissionError(13, "Permission denied", f"/data/{name}")
    said = without_paths(str(error))
    assert said in [f"[Errno 13] Permission denied: {quote}<path>{quote}" for quote in "'\""]


@pytest.mark.parametrize("text", ["cannot open '/data/it's/secret/x'", "no /data/it's/secret/x"])
def test_an_apostrophe_ends_no_path(text):
    assert "secret" not in without_paths(text)


@pytest.mark.parametrize(
    "text",
    ["https://docs.vllm.ai/en/x", "send it to /v1/completions", "'/v1/models'", "rows/s", "1 / 2",
     "a/b/c", "</s>", "file:///data/x", "", "'/'", "use /health or /v1.", "POST /tokenize",
     "/v2/embed", "'/v2/embed'", "Unresolvable ref: #/$defs/Foo", "sum(x)/n", "sum(x)/n/m",
     "torch.Size([3])/2", "Accept: */*", "http://[::1]/x", "http://[::1]/x/y", "http://h/a?p=/b",
     "http://h/a?p=/b/c", "{base}/resolve/main", "^/api/[a-z]+$", "<base>/resolve/main", "'//'",
     "'prompt'/messages or 'input'", str(AdapterError("bad_value", "no", seen=1))],
)  # fmt: skip
def test_what_is_no_path_of_the_server_stays(text):
    assert without_paths(text) == text


@pytest.mark.parametrize("sent", ["/data/a", "/data/a/"])
def test_what_was_sent_stays_and_what_lies_below_it(sent):
    text = "'/data/a' '/data/a/x' '/data/ab' /data/a/y /data/b /data/a/x,y=/data/b"
    want = "'/data/a' '/data/a/x' '<path>' /data/a/y <path> /data/a/x,y=<path>"
    assert without_paths(text, [sent, ""]) == want


@pytest.mark.parametrize("sent", ["/", "//", "/srv", "/srv/", "/srv/.", "/srv/x/.."])
def test_below_what_is_all_or_nearly_all_nothing_stays(sent):
    text = f"no '{sent}' at '/srv/secret/x', '{sent}/secret/x', /srv/secret"
    assert without_paths(text, [sent]) == f"no '{sent}' at '<path>', '<path>', <path>"


@pytest.mark.parametrize(
    "part", ["'/a", "\"/a '/b", "'/\\", "/a/b:", "/a/a'", "'/a'b", "://", "/", "\\", ".", "a/"]
)
def test_long_texts_take_no_long_time(part):
    """An answer that repeats a long prompt, say."""
    start = time.process_time()
    for first in ("", "'", "/a", "'/a", "/a/b"):
        without_paths(first + part * (300_000 // len(part)))
    assert time.process_time() - start < 10  # a part of a second; minutes where it is quadratic
