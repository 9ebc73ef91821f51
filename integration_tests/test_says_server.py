"""Users, instructions and images over HTTP, in the field `lora_ext` and nowhere else.

One server whose cache has so few blocks that requests in flight are put back; steps of 64 tokens.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from openai import OpenAI

from integration_tests.conditioned import (
    IMAGES,
    USERS,
    WAVLLM,
    Case,
    adapter,
    fixture,
    images,
    instructions,
    users,
)
from integration_tests.matrix import BOUND, WHERE, http_error
from integration_tests.recorded_requests import examples
from integration_tests.reference_model import model, where, worn
from integration_tests.server import (
    Server,
    base_with_tokenizer,
    command,
    free_port,
    paused,
    serving,
    words,
)
from vllm_lora_ext.adapters.registry import load_adapter
from vllm_lora_ext.conditions.column import Column, Prompt

pytestmark = pytest.mark.engine
BASE, QUOTE = "base_llama_mha", 7
FOLDERS = {name: adapter(name).lora_path for name in (*USERS, WAVLLM, IMAGES)}
PASSES = "lora_ext:gate_passes_total"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("says")
    argv = command(
        base_with_tokenizer(root / BASE, BASE, {QUOTE: '"'}), free_port(), None, "--enforce-eager",
        "--enable-prompt-embeds", "--max-num-batched-tokens", "64", "--num-gpu-blocks-override",
        "14", "--max-cpu-loras", "8", "--lora-modules", *(f"{n}={p}" for n, p in FOLDERS.items()),
    )  # fmt: skip
    with serving(argv, root / "server.log", fork=True, VLLM_SERVER_DEV_MODE="1") as running:
        yield running


def post(server: Server, route: str, body: dict[str, Any]) -> httpx.Response:
    """With numbers that JSON has no word for, as some clients write them."""
    return httpx.post(
        f"{server.url}/v1/{route}", content=json.dumps(body), timeout=120, trust_env=False,
        headers={"Content-Type": "application/json"},
    )  # fmt: skip


def answer(server: Server, route: str, body: dict[str, Any], count: int) -> dict[str, Any]:
    """The one choice of a greedy answer."""
    parameters = {"max_tokens": count, "temperature": 0, "ignore_eos": True}
    found = post(server, route, {**parameters, "return_token_ids": True, **body})
    assert found.status_code == 200, found.text
    (choice,) = found.json()["choices"]
    return choice


def complete(server: Server, case: Case, as_text: bool = False, more: int = 0) -> dict[str, Any]:
    """A case's answer.

    Args:
        as_text: says what it says in `vllm_xargs`; more: tokens to go on for, which are left out.
    """
    given: dict[str, Any] = {"prompt": case.prompt}
    if isinstance(case.prompt, torch.Tensor):
        file = io.BytesIO()
        torch.save(case.prompt, file)
        given = {"prompt_embeds": base64.b64encode(file.getvalue()).decode()}
    if case.says and as_text:
        given["vllm_xargs"] = {"lora_ext": json.dumps(case.says)}
    elif case.says:
        given["lora_ext"] = case.says
    named, count = "base" if case.adapter is None else case.adapter.lora_name, len(case.answer)
    body = {"model": named, "logprobs": 0, **given}
    found = answer(server, "completions", body, count + more)
    return found | {"token_ids": found["token_ids"][:count]}


def in_flight(server: Server, cases: Sequence[Case], as_text: bool = False, more: int = 0) -> None:
    """Asks all at once; every number must be right."""
    with ThreadPoolExecutor(len(cases)) as pool:
        choices = list(pool.map(lambda case: complete(server, case, as_text, more), cases))
    errors = [(http_error(c, found), c.key) for c, found in zip(cases, choices, strict=True)]
    print(f"{len(cases)} in flight: max |dlogp| {max(errors)[0]:.1e}")
    assert max(errors)[0] < BOUND, sorted(errors)


def metrics(server: Server) -> dict[str, float]:
    text = httpx.get(f"{server.url}/metrics", timeout=60, trust_env=False).text
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name.partition("{")[0]: float(value) for name, value in lines}


def base_case() -> Case:
    _, numbers = fixture(WAVLLM)
    logits = numbers["base_logits_0"][-1:]
    return Case("base", numbers["prompt_0"].tolist(), [int(logits[0].argmax())], logits)


def test_the_authors_numbers(server: Server) -> None:
    """All in flight, over two slots; again, said as text; then alone, where `make matrix` asks each
    and else some."""
    cases = [*users(), *instructions(), *images(), base_case()]
    shuffled = [cases[i] for i in np.random.default_rng(0).permutation(len(cases))]
    in_flight(server, shuffled)
    in_flight(server, shuffled, as_text=True)
    for case in cases if WHERE in os.environ else cases[::6]:
        in_flight(server, [case])


def test_after_a_preemption(server: Server) -> None:
    """Eight requests at a time, each with a block and soon with six, of which there are 13."""
    preempted = "vllm:num_preemptions_total"
    before = metrics(server)[preempted]
    cases = [images()[1], images()[3], *instructions()[:2]] * 3
    with ThreadPoolExecutor(1) as pool:
        with paused(server) as wait_for:
            asked = pool.submit(in_flight, server, cases, more=150)
            wait_for({IMAGES}, 6)
        asked.result()
    assert metrics(server)[preempted] > before


def test_again_from_the_prefix_cache(server: Server) -> None:
    hits = "vllm:prefix_cache_hits_total"
    long = [c for c in (*instructions(), *images()) if len(c.prompt) > 32]
    for case in long:
        in_flight(server, [case])
        before = metrics(server)[hits]
        in_flight(server, [case], as_text=True)
        assert metrics(server)[hits] == before + 32, case.key


def test_an_instruction_is_computed_once(server: Server) -> None:
    case = instructions()[0]
    said = [{"instruction": {"ids": [9, 8, 7 + i]}} for i in range(2)]
    before = metrics(server)[PASSES]
    asked = [replace(case, says=said[i % 2]) for i in range(6)]
    with ThreadPoolExecutor(len(asked)) as pool:
        choices = list(pool.map(lambda one: complete(server, one), asked))
    assert metrics(server)[PASSES] - before == 2
    for i in (0, 1):
        assert len({tuple(choice["token_ids"]) for choice in choices[i::2]}) == 1


def test_an_instruction_that_is_a_text(server: Server) -> None:
    """It alone and in quotation marks; in a chat, the last message of the user."""
    meta, numbers = fixture(WAVLLM)
    for case, request in zip(instructions(), meta["requests"], strict=True):
        ids = numbers[f"gate_ids_{request['prompt']}"].tolist()
        assert ids[0] == ids[-1] == QUOTE
        text = words(ids[1:-1])
        in_flight(server, [replace(case, says={"instruction": text})])
        start, stop = request["instruction_span"]
        assert case.prompt[start:stop] == ids[1:-1]
        body = {
            "model": WAVLLM, "logprobs": True,
            "messages": [
                {"role": "system", "content": words(case.prompt[:start])},
                {"role": "user", "content": text},
            ],
            "chat_template_kwargs": {"ending": words(case.prompt[stop:])},
        }  # fmt: skip
        said = answer(server, "chat/completions", body, len(case.answer))
        got = [token["logprob"] for token in said["logprobs"]["content"]]
        said["logprobs"] = {"token_logprobs": got}
        assert http_error(case, said) < BOUND, case.key


@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_user_of_one_modality(server: Server, kind: str) -> None:
    """An adapter made for a user, added where tokens stand for an image, or where none does."""
    _, numbers = fixture("reclora-a")
    prompt, user = numbers["prompt_2"].tolist(), numbers["user_vec_u1"]
    spans, scale, count = [[3, 9], [12, 20]], -0.5, 4
    template = load_adapter(FOLDERS["reclora-a"]).template
    worn_there = where(template.derive(user, None), Column(scale=scale, modalities=(kind,)))
    net, ids, rows = model(BASE), list(prompt), []
    for _ in range(count):
        said = Prompt(len(prompt), prompt, {"image": tuple(map(tuple, spans))})
        with torch.inference_mode(), ExitStack() as hooks:
            hooks.enter_context(worn(net, worn_there, replace(said, length=len(ids), ids=ids)))
            rows.append(net(torch.tensor([ids])).logits[0, -1])
        ids.append(int(rows[-1].argmax()))
    says = {
        "adapters": [{"name": "reclora-a", "scale": scale, "modality": kind}],
        "user": user.tolist(), "modality_spans": {"image": spans},
    }  # fmt: skip
    case = Case(kind, prompt, ids[len(prompt) :], torch.stack(rows), None, says)
    in_flight(server, [case, base_case(), case])


def spoken(answer: httpx.Response) -> list[str]:
    """The text of each choice of an answer, or of its stream's pieces."""
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if "data: {" in line]
    texts: dict[int, str] = {}
    for piece in map(json.loads, lines) if lines else [answer.json()]:
        for choice in piece.get("choices", ()):
            found = choice.get("text") or (choice.get("message") or choice.get("delta"))["content"]
            texts[choice["index"]] = texts.get(choice["index"], "") + (found or "")
        if piece.get("type") in ("response.output_text.delta", "content_block_delta"):
            found = piece["delta"]
            texts[0] = texts.get(0, "") + (found if isinstance(found, str) else found["text"])
        for item in piece.get("output", ()):
            texts[0] = item["content"][0]["text"]
        for item in piece.get("content", ()) if piece.get("type") == "message" else ():
            texts[0] = item["text"]
    return [texts[i] for i in sorted(texts)]


def test_tokenizing_needs_no_user(server: Server) -> None:
    body = {"model": "reclora-a", "prompt": "t5 t6"}
    found = httpx.post(f"{server.url}/tokenize", json=body, timeout=60, trust_env=False)
    assert (found.status_code, found.json()["tokens"]) == (200, [5, 6]), found.text


@pytest.mark.parametrize("stream", [False, True])
def test_every_route_gives_the_authors_text(server: Server, stream: bool) -> None:
    case = users()[5]
    assert not {0, 2, QUOTE} & {*case.prompt, *case.answer}, "tokens that are no words"
    for route, more in ROUTES:
        if more is BEAMS:
            continue
        body = asking(route, words(case.prompt), len(case.answer))
        body |= {"model": case.adapter.lora_name, "stream": stream, "lora_ext": case.says}
        body |= {"temperature": 1, "top_k": 1} if "n" in more else {"temperature": 0}
        found = post(server, route, body | more)
        assert found.status_code == 200, found.text
        texts = spoken(found)
        said = [text.split() for text in texts]
        assert said == [words(case.answer).split()] * more.get("n", 1), (route, more)


def test_the_page_of_requests_is_true(server: Server) -> None:
    """Its examples of users, instructions and images, with the fixtures' requests."""
    _, numbers = fixture(WAVLLM)
    with OpenAI(
        base_url=f"{server.url}/v1", api_key="none", timeout=60, max_retries=0,
        http_client=httpx.Client(trust_env=False),
    ) as client:  # fmt: skip
        for tag, case, model_of, said in (
            ("user", users()[5], "reclora", {"user_vector": users()[5].says["user"]}),
            (
                "instruction", instructions()[0], "wavllm",
                {"instruction": words(numbers["gate_ids_0"].tolist()[1:-1])},
            ),
            (
                "image", images()[1], "mmlora",
                {"image_spans": images()[1].says["modality_spans"]["image"]},
            ),
        ):  # fmt: skip
            (block,) = examples("requests.md", tag)
            block = block.replace(f'"{model_of}"', f'"{case.adapter.lora_name}"')
            scope: dict[str, Any] = {"client": client, "prompt": case.prompt, **said}
            exec(compile(block, "docs/requests.md", "exec"), scope)
            got = scope["answer"].choices[0].text.split()
            assert got == words(case.answer[:8]).split(), tag


def fingerprint(server: Server) -> dict[str, Any]:
    """Exact answers of each kind, and what the server holds."""
    cases = [users()[0], instructions()[0], images()[1], base_case()]
    answers = [complete(server, case)["logprobs"] for case in cases]
    held = httpx.get(f"{server.url}/v1/lora_ext/adapters", timeout=60, trust_env=False)
    return {"answers": answers, "held": held.json(), "bytes": metrics(server)[RESIDENT]}


RESIDENT = "lora_ext:resident_bytes"
USER = [0.5] * 20
IDS = {"ids": [5, 6]}
# Only the prompt's tokens show it.
PAST_THE_PROMPT = {"modality_spans": {"image": [[3, 99]]}}
WRONG: list[tuple[str, Any, str]] = [
    ("reclora-a", {}, "lora_ext.user is missing: adapter reclora-a needs it"),
    ("reclora-a", None, "lora_ext.user is missing: adapter reclora-a needs it"),
    ("reclora-a", {"user": USER[1:]}, "lora_ext.user"),
    ("reclora_token-a", {"user": USER}, "lora_ext.user"),
    ("reclora-a", {"user": [*USER[1:], float("nan")]}, "lora_ext.user[19]"),
    ("reclora-a", {"user": [1e39, *USER[1:]]}, "lora_ext.user[0]"),
    ("reclora-a", {"user": ["0.5", *USER[1:]]}, "lora_ext.user[0]"),
    ("reclora-a", {"user": "u1"}, "lora_ext.user"),
    ("reclora-a", {"user": USER, "instruction": IDS}, "lora_ext.instruction has no use here"),
    ("base", {"user": USER}, "lora_ext.user has no use here"),
    ("base", {"adapters": [{"name": "reclora-a"}]}, "lora_ext.user is missing"),
    ("base", {"adapters": [{"name": n} for n in USERS[:2]], "user": USER}, "lora_ext.user"),
    (WAVLLM, {}, "lora_ext.instruction is missing: adapter wavllm-a needs it"),
    (WAVLLM, {"instruction": ""}, "lora_ext.instruction"),
    (WAVLLM, {"instruction": {"ids": []}}, "lora_ext.instruction.ids"),
    (WAVLLM, {"instruction": {"ids": [160]}}, "lora_ext.instruction.ids"),
    (WAVLLM, {"instruction": {"ids": [-1]}}, "lora_ext.instruction.ids[0]"),
    (WAVLLM, {"instruction": {"ids": [5] * 300}}, "lora_ext.instruction"),
    (WAVLLM, {"instruction": "t5 " * 300}, "lora_ext.instruction"),
    (WAVLLM, {"instruction": {"text": "t5"}}, "lora_ext.instruction"),
    (IMAGES, PAST_THE_PROMPT, "lora_ext.modality_spans.image"),
    (IMAGES, {"modality_spans": {"image": [[3, 2]]}}, "lora_ext.modality_spans.image[0]"),
    (IMAGES, {"modality_spans": {"image": [[3, None]]}}, "lora_ext.modality_spans.image[0]"),
    (IMAGES, {"modality_spans": {"text": [[0, 2]]}}, "lora_ext.modality_spans.text"),
    (IMAGES, {"modality_spans": {"image": [[0, 1]] * 65}}, "max_request_spans 64"),
    (IMAGES, {"user": USER}, "lora_ext.user has no use here"),
    ("base", {"adapters": [{"name": IMAGES, "modality": 5}]}, "lora_ext.adapters[0].modality"),
    ("base", {"modality_spans": {"image": [[0, 2]]}}, "lora_ext.modality_spans has no use here"),
    (IMAGES, {"instruction": IDS}, "lora_ext.instruction has no use here"),
    (IMAGES, {"gates": {"red": 1}}, "lora_ext.gates has no use here"),
    (IMAGES, {"trace": "perhaps"}, "lora_ext.trace"),
    ("base", {"adapters": {"name": IMAGES}}, "lora_ext.adapters is wrong"),
    ("base", {"adapters": [{"scale": 1}]}, "lora_ext.adapters[0].name"),
    ("base", {"adapters": [{"name": IMAGES, "weight": 1}]}, "lora_ext.adapters[0].weight"),
    ("base", {"adapters": [{"name": IMAGES, "scale": float("inf")}]}, "lora_ext.adapters[0].scale"),
    ("base", {"adapters": [{"name": IMAGES, "spans": [[-1, 3]]}]}, "lora_ext.adapters[0].spans[0]"),
    ("base", {"adapters": [{"name": IMAGES, "spans": [[1]]}]}, "lora_ext.adapters[0].spans[0]"),
    ("base", [], "lora_ext of the request is no object"),
    ("base", "not JSON", "lora_ext of the request is no JSON"),
]


BEAMS = {"use_beam_search": True, "n": 2}
ROUTES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("completions", {}), ("completions", {"n": 2}), ("completions", BEAMS),
    ("chat/completions", {}), ("chat/completions", {"n": 2}), ("chat/completions", BEAMS),
    ("responses", {}), ("messages", {}),
)  # fmt: skip


def asking(route: str, text: str, count: int) -> dict[str, Any]:
    """The body of a request."""
    if route == "completions":
        return {"prompt": text, "max_tokens": count}
    if route == "responses":
        return {"input": text, "max_output_tokens": count}
    return {"messages": [{"role": "user", "content": text}], "max_tokens": count}


@pytest.mark.parametrize(
    ("route", "more", "stream"),
    [(route, more, stream) for route, more in ROUTES for stream in (False, True)
     if (route, more, stream) != ("completions", BEAMS, True)],  # vLLM has none
)  # fmt: skip
def test_what_only_the_prompt_shows_to_be_wrong_is_400(
    server: Server, route: str, more: dict[str, Any], stream: bool
) -> None:
    for named, said, code, words_of_it in (
        (IMAGES, PAST_THE_PROMPT, "bad_value", "modality_spans.image is outside of the prompt"),
        ("reclora-a", {"user": USER, "trace": True}, "not_traced", "its setting trace is off"),
    ):
        body = {"model": named, "lora_ext": said, "stream": stream, **asking(route, "t5 t6", 2)}
        found = post(server, route, body | more)
        assert found.status_code == 400, (named, found.text)
        error = found.json()["error"]
        assert error["type"] == code and words_of_it in error["message"], error


@pytest.mark.parametrize("stream", [False, True])
def test_a_field_that_is_wrong_is_400_and_leaves_nothing(server: Server, stream: bool) -> None:
    before = fingerprint(server)
    for named, said, words_of_it in WRONG:
        body = {"model": named, "prompt": [5, 6, 7], "max_tokens": 1, "stream": stream}
        found = post(server, "completions", body | ({} if said is None else {"lora_ext": said}))
        seen = found.status_code, found.json()["error"]["type"], found.json()["error"]["param"]
        assert seen == (400, "bad_value", "lora_ext"), (named, said, found.text)
        assert words_of_it in found.json()["error"]["message"], (named, said, found.text)
    assert fingerprint(server) == before
