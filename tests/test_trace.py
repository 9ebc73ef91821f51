"""Traces: what is recorded is what the gates computed; bounds, JSON, pictures, the command."""

from __future__ import annotations

import dataclasses
import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make_adapters import BASE_LLAMA, FIXTURES, random_spec
from typer.testing import CliRunner

from vllm_lora_ext.adapters import load_adapter
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.cli import app
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.routing import delta_reference
from vllm_lora_ext.trace import Trace, TraceStore, picture, read_answers, record, wanted
from vllm_lora_ext.trace.client import ask_server
from vllm_lora_ext.trace.fetch import check_on
from vllm_lora_ext.trace.gates import slice_gates
from vllm_lora_ext.verify import load_base

ROUTED = FIXTURES / "routed"
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.10.mlp.down_proj"
NAN = float("nan")


@pytest.fixture(scope="module")
def llama() -> Any:
    return load_base(BASE_LLAMA)


def random_slice(seed: int, width: int = 24, out: int = 7) -> RoutedModule:
    rng = np.random.default_rng(seed)
    spec = random_spec(rng, sources=["router", "self", "prototype"])
    draw = torch.Generator().manual_seed(seed)
    rank = sum(spec.blocks)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    return RoutedModule(
        normal(rank, width), normal(out, rank), spec,
        router_GK=None if spec.source == "self" else normal(spec.num_gates, width),
        bias_G=None if spec.bias == "none" else normal(spec.num_gates),
        head_K=normal(width) if spec.threshold_head else None,
    )  # fmt: skip


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_gates_explain_the_layer(seed: int) -> None:
    """One gate at a time, its experts' A and B weighted by it: the sum is what the layer adds."""
    s = random_slice(seed)
    x_TK = torch.randn(5, s.a_RK.shape[1], generator=torch.Generator().manual_seed(seed + 1))
    gates_TG = slice_gates(s, x_TK)
    assert gates_TG.shape == (5, s.gate.num_gates)
    total, at = torch.zeros(5, s.b_NR.shape[0]), 0
    for g, block in enumerate(s.gate.blocks):
        ranks = slice(at, at + block)
        total += gates_TG[:, g : g + 1] * (x_TK @ s.a_RK[ranks].T @ s.b_NR[:, ranks].T)
        at += block
    assert torch.allclose(total, delta_reference(s, x_TK), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["loramoe-a", "mixlora-a", "meteora-a", "flylora-a", "mola-a"])
def test_record_sees_every_gate(name: str) -> None:
    """Each layer's input is taken by hooks of this test's own, and gated by the definition."""
    root = ROUTED / name
    base = FIXTURES / "bases" / json.loads((root / "meta.json").read_text())["base"]
    adapter, model = load_adapter(root / "adapter"), load_base(base)
    found = record(model, adapter, [5, 6, 7, 8, 9], new_tokens=3, name="mine")
    assert (found.adapter, found.system, found.prompt_tokens) == ("mine", adapter.system, 5)
    assert len(found.token_ids) == 5 + 2 and found.token_ids[:5] == [5, 6, 7, 8, 9]
    owners = {**adapter.modules, **adapter.blocks}
    assert set(found.weights) == {n for n, o in owners.items() if o.gate.source != "none"}
    for key, weight_TE in found.weights.items():
        gate = owners[key].gate
        assert weight_TE.shape == (7, gate.num_gates) and weight_TE.dtype == torch.float32
        if gate.select == "top_k":
            assert (weight_TE != 0).sum(dim=1).tolist() == [gate.k] * 7
        if gate.weight == "renormalise":
            assert torch.allclose(weight_TE.sum(dim=1), torch.ones(7), atol=1e-5)
    handles = len([h for m in model.modules() for h in m._forward_hooks])
    assert handles == 0
    logits = model(torch.tensor([found.token_ids[:5]])).logits[0, -1]
    assert record(model, adapter, [5, 6, 7, 8, 9]).token_ids == [5, 6, 7, 8, 9]
    assert torch.equal(logits, model(torch.tensor([[5, 6, 7, 8, 9]])).logits[0, -1])


def test_record_gives_the_first_layers_gates(llama: Any) -> None:
    adapter = load_adapter(ROUTED / "loramoe-a" / "adapter")
    name = "model.layers.0.mlp.up_proj"
    inputs: list[torch.Tensor] = []
    layer = llama.get_submodule(name)
    handle = layer.register_forward_hook(lambda _layer, args, _y: inputs.append(args[0][0]))
    found = record(llama, adapter, [11, 12, 13])
    handle.remove()
    router_GK = adapter.modules[name].router_GK
    want_TG = torch.softmax(inputs[-1] @ router_GK.T, dim=-1)
    assert torch.allclose(found.weights[name], want_TG, atol=1e-6)


def test_a_plain_lora_has_no_gates(llama: Any) -> None:
    found = record(llama, load_adapter(ROUTED / "plain-a" / "adapter"), [5, 6])
    assert found.weights == {} and found.usage() == {}
    with pytest.raises(AdapterError) as caught:
        picture(found, "nothing.png")
    assert caught.value.code == "bad_value"


def example(tokens: int = 4) -> Trace:
    generator = torch.Generator().manual_seed(0)
    up = torch.rand(tokens, 3, generator=generator)
    up[:, 1] = 0.0
    up[2] = NAN
    down = -torch.rand(tokens, 2, generator=generator)
    texts = [f"t{i}" for i in range(tokens)]
    return Trace(list(range(tokens)), {UP: up, DOWN: down}, 2, "a", "meteora", "b", texts)


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**31))
@settings(max_examples=40)
def test_json_keeps_every_bit(tokens: int, experts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight_TE = torch.randn(tokens, experts, generator=generator)
    weight_TE *= (torch.rand(tokens, experts, generator=generator) < 0.5).float()
    weight_TE[torch.rand(tokens, generator=generator) < 0.2] = NAN
    trace = Trace(list(range(tokens)), {UP: weight_TE}, tokens, "a")
    again = Trace.from_json(trace.to_json())
    assert again.weights[UP].equal(weight_TE) or torch.equal(
        again.weights[UP].nan_to_num(7.0), weight_TE.nan_to_num(7.0)
    )
    assert dataclasses.replace(again, weights={}) == dataclasses.replace(trace, weights={})


def test_a_process_of_another_default_dtype_reads_the_same() -> None:
    """As an engine is while its model is built."""
    trace = Trace([1], {"m": torch.tensor([[1 / 3, 2 / 3]])}, 1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        again = Trace.from_json(trace.to_json())
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(again.weights["m"], trace.weights["m"])


def test_json_holds_the_chosen_only() -> None:
    module = example().to_dict()["modules"][UP]
    assert module["num_experts"] == 3
    assert [None if e is None else e for e in module["experts"]] == [[0, 2], [0, 2], None, [0, 2]]
    assert module["weights"][2] is None and len(module["weights"][0]) == 2


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda d: "{", "bad_json"), (lambda d: "[]", "bad_json"),
        (lambda d: json.dumps(d | {"format": "2"}), "unknown_version"),
        (lambda d: json.dumps(d | {"more": 1}), "bad_value"),
        (lambda d: json.dumps({k: v for k, v in d.items() if k != "tokens"}), "bad_value"),
        (lambda d: json.dumps(d | {"tokens": ["one"]}), "bad_value"),
        (lambda d: json.dumps(d | {"token_ids": [1.5]}), "bad_value"),
        (lambda d: json.dumps(d | {"prompt_tokens": 9}), "bad_value"),
        (lambda d: json.dumps(d | {"adapter": None}), "bad_value"),
        (lambda d: json.dumps(d | {"modules": [1]}), "bad_value"),
        (lambda d: json.dumps(d | {"modules": {UP: {"experts": []}}}), "bad_value"),
        (lambda d: _with(d, num_experts=2), "bad_value"),
        (lambda d: _with(d, num_experts=0), "bad_value"),
        (lambda d: _with(d, experts=[[0, 0]] * 4), "bad_value"),
        (lambda d: _with(d, weights=[[1.0]] * 4), "bad_value"),
        (lambda d: _with(d, weights=[[1.0, float("nan")]] * 4), "bad_json"),
    ],
)  # fmt: skip
def test_what_is_no_trace_is_refused(change: Any, code: str) -> None:
    with pytest.raises(AdapterError) as caught:
        Trace.from_json(change(example().to_dict()))
    assert caught.value.code == code


@pytest.mark.parametrize("count", [-1 << 16, 0, (1 << 16) + 1, 10**30, True, None, 2.0])
def test_every_count_of_experts_is_checked_before_anything_is_kept(
    monkeypatch: pytest.MonkeyPatch, count: object
) -> None:
    """A negative one would let the sum of sizes pass, one too large would be of wrong code."""
    given = example().to_dict()
    monkeypatch.setattr(torch, "full", lambda *_, **__: pytest.fail("memory is taken"))
    given["modules"] = {name: {"num_experts": n, "experts": [[]] * 4, "weights": [[]] * 4}
               for name, n in ((UP, 1 << 16), (DOWN, count))}  # fmt: skip
    with pytest.raises(AdapterError) as caught:
        Trace.from_json(json.dumps(given))
    assert caught.value.code == "bad_value" and DOWN in caught.value.text


def _with(d: dict[str, Any], **parts: Any) -> str:
    return json.dumps(d | {"modules": {UP: d["modules"][UP] | parts}})


def test_usage_counts_tokens_and_bits() -> None:
    weight_TE = torch.tensor([[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [NAN] * 4])
    usage = Trace([1, 2, 3], {UP: weight_TE}, 3).usage()[UP]
    assert usage.share == [1.0, 0.5, 0.0, 0.0]
    assert usage.mean_weight == [0.75, 0.25, 0.0, 0.0]
    assert usage.entropy == pytest.approx(0.8112781)
    even = Trace([1], {UP: torch.full((1, 8), -0.125)}, 1).usage()[UP]
    assert even.entropy == pytest.approx(3.0)
    nothing = Trace([1], {UP: torch.full((1, 2), NAN)}, 1).usage()[UP]
    assert (nothing.share, nothing.entropy) == ([0.0, 0.0], 0.0)


@pytest.mark.parametrize(("tokens", "experts"), [(1, 1), (4, 3), (130, 11), (7, 40)])
def test_pictures_are_drawn(tokens: int, experts: int, tmp_path: Path) -> None:
    weight_TE = torch.rand(tokens, experts)
    weight_TE[0] = NAN
    texts = ["$x$\n"] * tokens
    trace = Trace([1] * tokens, {UP: weight_TE, DOWN: weight_TE}, tokens // 2, tokens=texts)
    file = picture(trace, tmp_path / "trace.png")
    assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    whole = file.stat().st_size
    assert picture(trace, file, module="down_proj").stat().st_size != whole
    for wrong, code in ((tmp_path / "no" / "t.png", "output_failed"), ("t.xyz", "output_failed")):
        with pytest.raises(AdapterError) as caught:
            picture(trace, wrong)
        assert caught.value.code == code


def put(store: TraceStore, key: str, tokens: int = 4, experts: int = 4) -> None:
    store.start(key, [1] * tokens, "a")
    store.put_gates(key, 0, UP, torch.ones(tokens, experts))


def code_of(store: TraceStore, *asked: Any) -> str:
    with pytest.raises(AdapterError) as caught:
        store.get(*asked)
    return caught.value.code


def test_the_store_puts_pieces_in_their_places() -> None:
    store = TraceStore()
    store.start("cmpl-1-0-0123abcd", [5, 6, 7], "a", "mola", "b")
    store.put_gates("cmpl-1-0-0123abcd", 1, DOWN, torch.full((2, 2), 2.0))
    store.put_gates("cmpl-1-0-0123abcd", 3, UP, torch.full((1, 3), 3.0))
    store.put_ids("cmpl-1-0-0123abcd", 3, torch.tensor([8]))
    store.put_gates("cmpl-1-0-0123abcd", 2, DOWN, torch.full((1, 2), 4.0))  # computed again
    store.put_gates("another", 0, DOWN, torch.ones(1, 2))  # not started: nothing is kept
    trace = store.get("cmpl-1")
    assert (trace.token_ids, trace.prompt_tokens, trace.system) == ([5, 6, 7, 8], 3, "mola")
    assert list(trace.weights) == [UP, DOWN]
    assert trace.weights[DOWN][:, 0].nan_to_num(-1).tolist() == [-1, 2, 4, -1]
    assert trace.weights[UP][:, 0].nan_to_num(-1).tolist() == [-1, -1, -1, 3]


def test_the_store_knows_the_engines_ids() -> None:
    store = TraceStore()
    for key in ("c-0-0123abcd", "c-1-0123abcd", "2_c-0-aaaaaaaa", "chat-bbbbbbbb", "7"):
        store.start(key, [len(key)])
        store.put_gates(key, 0, UP, torch.ones(1, 1))
    assert store.get("c").token_ids == [12] == store.get("c", 1).token_ids
    assert store.get("c", 0, 2).token_ids == [14]
    assert store.get("chat").token_ids == [13] and store.get("7").token_ids == [1]
    for asked in (("c", 2), ("c", 0, 1), ("cha",), ("c-0-0123",), (".*",), ("",)):
        assert code_of(store, *asked) == "not_found"
    store.pass_by("other-0-0123abcd")
    assert code_of(store, "other") == "not_traced"


def test_the_store_is_bounded() -> None:
    store = TraceStore()
    store.max_requests, store.max_bytes, store.max_untraced = 3, 200, 2
    for key in "abcd":
        store.pass_by(key)
        put(store, f"r{key}", experts=2)  # 32 bytes each
    assert code_of(store, "ra") == "not_found" and code_of(store, "a") == "not_found"
    assert code_of(store, "d") == "not_traced"
    assert len(store.get("rb").token_ids) == 4
    put(store, "large", experts=10)  # 160: the others go, the oldest first, as far as needed
    assert code_of(store, "rc") == "not_found" and len(store.get("rd").token_ids) == 4
    put(store, "huge", experts=20)  # 320 alone
    assert code_of(store, "huge") == "too_large"
    store.put_gates("huge", 4, UP, torch.ones(1, 20))
    assert code_of(store, "huge") == "too_large" and len(store.get("large").token_ids) == 4
    assert store._bytes == 32 + 160


def test_ranks_are_merged() -> None:
    trace = example()
    halves = [dataclasses.replace(trace, weights={n: trace.weights[n]}) for n in (DOWN, UP)]
    merged = read_answers([half.to_json() for half in halves] * 2)
    assert list(merged.weights) == [UP, DOWN]
    assert merged.to_json() == trace.to_json()
    with pytest.raises(AdapterError) as caught:
        read_answers([trace.to_json(), str(AdapterError("not_traced", "no"))])
    assert caught.value.code == "not_traced"


def test_what_a_request_may_say() -> None:
    assert [wanted({"lora_ext_trace": v}) for v in (True, 1, "true", False, 0)] == [
        True, True, True, False, False,
    ]  # fmt: skip
    assert not wanted(None) and not wanted({"other": 1})
    for value in (2, "yes", [1], -1):
        with pytest.raises(AdapterError) as caught:
            wanted({"lora_ext_trace": value})
        assert caught.value.code == "bad_value"
    check_on({"lora_ext": {"trace": True}})
    for config in (None, {}, {"lora_ext": {"trace": False}}):
        with pytest.raises(AdapterError) as caught:
            check_on(config)
        assert caught.value.code == "not_traced"


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["trace", *map(str, arguments)])
    return done.exit_code, done.stdout if done.exit_code < 2 else done.output


def test_the_command(tmp_path: Path, llama: Any) -> None:
    adapter = ROUTED / "loramoe-a" / "adapter"
    options = (adapter, "--base", BASE_LLAMA, "--prompt", "[5, 6, 7]", "--new-tokens", 3)
    code, text = run(
        *options, "--out", tmp_path / "t.json", "--picture", tmp_path / "t.png", "--module", "up"
    )
    assert code == 0 and "3 routed modules" in text and "down_proj" not in text
    found = Trace.from_json((tmp_path / "t.json").read_text())
    want = record(llama, load_adapter(adapter), [5, 6, 7], new_tokens=3)
    assert found.token_ids == want.token_ids
    assert all(found.weights[n].equal(want.weights[n]) for n in want.weights)
    assert (tmp_path / "t.png").stat().st_size > 1000
    code, text = run(*options, "--json")
    assert code == 0 and json.loads(text)["token_ids"] == want.token_ids


def test_the_commands_errors(tmp_path: Path) -> None:
    adapter = ROUTED / "loramoe-a" / "adapter"
    given = (adapter, "--base", BASE_LLAMA, "--prompt", "[5]")
    for arguments, said in (
        ((), "--prompt"), (("--prompt", "x"), "ADAPTER"), ((adapter, "--prompt", "x"), "--base"),
        ((*given, "--model", "m"), "--model"), ((*given, "--url", "http://h"), "ADAPTER"),
        (("--url", "http://h", "--prompt", "x"), "--model"),
        ((adapter, "--base", BASE_LLAMA, "--prompt", "text"), "tokenizer"),
    ):  # fmt: skip
        code, text = run(*arguments)
        assert code == 2 and said in text, arguments
    for arguments, wanted_code in (
        ((*given, "--out", tmp_path / "no" / "t.json"), "output_failed"),
        ((tmp_path, "--base", BASE_LLAMA, "--prompt", "[5]"), "missing_file"),
        ((adapter, "--base", tmp_path / "no", "--prompt", "[5]"), "not_found"),
        (("--url", "ftp://h", "--model", "m", "--prompt", "x"), "request_failed"),
    ):  # fmt: skip
        code, text = run(*arguments, "--json")
        assert (code, json.loads(text)["error"]["code"]) == (1, wanted_code)


class _Handler(http.server.BaseHTTPRequestHandler):
    """Plays a server: `answers` by method, `asked` what came."""

    answers: dict[str, tuple[int, str]]
    asked: list[tuple[str, str | None, Any]]

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        type(self).asked.append((self.path, self.headers.get("Authorization"), body))
        status, text = self.answers[self.command]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    do_POST = do_GET

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, type[_Handler]]]:
    handler = type("Handler", (_Handler,), {"answers": {}, "asked": []})
    running = http.server.HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}", handler
    running.shutdown()
    running.server_close()


def test_the_client_asks_and_fetches(server: tuple[str, type[_Handler]]) -> None:
    url, handler = server
    handler.answers = {"POST": (200, '{"id": "cmpl-a/b"}'), "GET": (200, example().to_json())}
    assert ask_server(f"{url}/v1/", "m", [1, 2], 5, api_key="k").to_json() == example().to_json()
    (path, key, body), (then, then_key, _) = handler.asked
    assert (path, key, then_key) == ("/v1/completions", "Bearer k", "Bearer k")
    assert then == "/v1/lora_ext/trace/cmpl-a%2Fb"
    assert body["vllm_xargs"] == {"lora_ext_trace": 1} and body["prompt"] == [1, 2]
    assert (body["max_tokens"], body["temperature"], body["model"]) == (5, 0, "m")
    ask_server(url, "m", "hello", chat=True)
    assert handler.asked[2][0] == "/v1/chat/completions"
    assert handler.asked[2][2]["messages"] == [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("post", "get", "code"),
    [
        ((200, "{}"), (200, "{}"), "request_failed"), ((200, "no"), (200, ""), "request_failed"),
        ((404, '{"detail": "none"}'), (200, ""), "request_failed"),
        ((400, f'{{"error": {{"message": "{AdapterError("not_traced", "off")}"}}}}'), (200, ""),
         "not_traced"),
        ((200, '{"id": "a"}'), (404, '{"error": {"type": "not_found", "message": "gone"}}'),
         "not_found"),
        ((200, '{"id": "a"}'), (500, '{"error": {"type": "Other", "message": "gone"}}'),
         "request_failed"),
        ((200, '{"id": "a"}'), (200, "[]"), "bad_json"),
    ],
)  # fmt: skip
def test_the_clients_errors(
    server: tuple[str, type[_Handler]], post: Any, get: Any, code: str
) -> None:
    url, handler = server
    handler.answers = {"POST": post, "GET": get}
    with pytest.raises(AdapterError) as caught:
        ask_server(url, "m", "x")
    assert caught.value.code == code


def test_record_takes_the_adapter_off_when_it_fails(llama: Any) -> None:
    wide = RoutedModule(torch.ones(1, 3), torch.ones(2, 1))
    with pytest.raises(AdapterError):
        record(llama, RoutedAdapter({UP: wide}, "plain"), [5])
    assert not any(m._forward_hooks for m in llama.modules())
