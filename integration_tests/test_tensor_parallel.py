"""Two ranks, over multiprocessing and over Ray, against the authors' numbers and transformers."""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoConfig

from integration_tests import forked
from integration_tests.engines import ENVIRONMENT, base_path, recorded, worst
from integration_tests.followed import MADE, write_made
from integration_tests.matrix import merged
from integration_tests.reference_model import logits, model, steady_prompt
from integration_tests.tp_worker import MARK, TP_ENVIRONMENT, ours
from tests import dora_folders
from tests.make_adapters import random_adapter, random_spec
from vllm_lora_ext.adapters import load_adapter
from vllm_lora_ext.adapters.readers.native import write_native
from vllm_lora_ext.routing import GateSpec

BASE, VOCABULARY, BOUND, TIMEOUT = "base_llama", 512, 1e-4, 600
ROOT = Path(__file__).parent.parent
HEAD = GateSpec(
    source="router", blocks=(3, 2, 4), score="softmax", select="threshold", threshold=0.5,
    threshold_head=True, subtract_threshold=True,
)  # fmt: skip

pytestmark = [pytest.mark.engine, pytest.mark.timeout(TIMEOUT + 60)]


@dataclass(frozen=True)
class Request:
    """One row of the mixed batch, and what a single fp32 rank makes of it."""

    label: str
    prompt: list[int]
    folder: Path | None
    logits: torch.Tensor
    greedy: list[int]


@pytest.fixture(scope="module")
def requests(tmp_path_factory) -> list[Request]:
    """Base rows, plain, merged, and routed: published ones, any gate, a learned threshold,
    self-gated."""
    rows = []
    for name in ("loramoe-a", "plain-a", "mixlora-a"):
        fx = recorded(name)
        rows += [
            Request(name, fx.prompts[i], fx.folder, fx.logits[i], fx.greedy[i]) for i in (1, 2)
        ]
    rows.insert(1, Request("base", fx.prompts[1], None, fx.base_logits[1], []))
    config = AutoConfig.from_pretrained(base_path(BASE))
    adapters = {
        "any-gate": random_adapter(config, 7),
        "threshold-head": random_adapter(config, 8, HEAD, targets=("o_proj", "down_proj")),
        "self-gated": random_adapter(config, 9, lambda r: random_spec(r, 16, sources=("self",))),
    }
    folders = {
        name: write_native(adapter, tmp_path_factory.mktemp(name))
        for name, adapter in adapters.items()
    }  # fmt: skip
    folders["merged"] = tmp_path_factory.mktemp("merged")
    merged(folders["merged"])
    for seed, (name, folder) in enumerate(folders.items()):
        adapter = load_adapter(folder)
        prompt = steady_prompt(BASE, adapter, 24, seed)
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(logits(BASE, adapter, ids)[-1].argmax()))
        rows.append(
            Request(name, prompt, folder, logits(BASE, adapter, prompt), ids[len(prompt) :])
        )
    return rows


@pytest.fixture(scope="module")
def dora(tmp_path_factory) -> Request:
    """Its norms are sums over the ranks in row-parallel layers."""
    folder = tmp_path_factory.mktemp("dora")
    tuned = dora_folders.make(folder, model(BASE))
    prompt = ids = steady_prompt(BASE, load_adapter(folder), 24, 5)
    with torch.no_grad():
        for _ in range(12):
            ids = [*ids, int(tuned(torch.tensor([ids])).logits[0, -1].argmax())]
        wanted = tuned(torch.tensor([prompt])).logits[0]
    return Request("dora", prompt, folder, wanted, ids[len(prompt) :])


def start(
    backend: str, requests: list[Request], refused: list[str], folder: Path, **options: Any
) -> tuple[int, str]:
    """Runs `tp_worker` to its end; everything it started is gone afterwards, or the test fails.

    Args:
        refused: folders that it tries to load.
    """
    job = {
        "backend": backend, "base": BASE, "vocabulary": VOCABULARY, "options": options,
        "requests": [(r.prompt, r.folder and r.label, str(r.folder)) for r in requests],
        "refused": refused, "made": str(folder / "made"),
    }  # fmt: skip
    write_made(folder / "made")
    (folder / "job.json").write_text(json.dumps(job))
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "integration_tests.tp_worker"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    log = folder / "log.txt"
    os.environ.update(ENVIRONMENT)  # of the process that is forked
    engine = forked.Command(
        [*command, str(folder / "job.json"), str(folder / "result.pt")], log,
        os.environ | TP_ENVIRONMENT | {"PYTHONPATH": path, MARK: mark},
    )  # fmt: skip
    try:
        code = engine.wait(TIMEOUT)
    except BaseException:
        engine.kill()
        raise
    finally:
        left = end_all(mark, engine.pid)
    assert not left, f"still running after the engine's end: {left}"
    return code, log.read_text()


def end_all(mark: str, session: int) -> list[str]:
    """Ends what is left of a run after a moment's grace, and says what that was."""
    deadline = time.monotonic() + 60
    while (left := ours(mark, session)) and time.monotonic() < deadline:
        time.sleep(0.2)
    names = []
    for process in left:
        try:
            names.append(f"{process.pid} {' '.join(process.cmdline())[:100]}")
            process.kill()
        except psutil.NoSuchProcess:
            continue
    return names


@dataclass(frozen=True)
class Run:
    backend: str
    result: dict[str, Any]
    requests: list[Request]


@pytest.fixture(scope="module", params=["mp", "ray"])
def tp2(request, requests, dora, tmp_path_factory) -> Iterator[Run]:
    """mp compiles, as a server does by default; Ray does not, which is quicker, and its ranks have
    half of every A and B (`--fully-sharded-loras`), where DoRA is refused."""
    backend = request.param
    if backend == "ray":
        pytest.importorskip("ray")
    folder = tmp_path_factory.mktemp(backend)
    began = time.monotonic()
    ray = backend == "ray"
    asked, refused = (requests, [str(dora.folder)]) if ray else ([*requests, dora], [])
    code, log = start(backend, asked, refused, folder, enforce_eager=ray, fully_sharded_loras=ray)
    assert code == 0, log[-6000:]
    result = torch.load(folder / "result.pt", weights_only=False)
    print(
        f"TP=2 {backend}: {result['executor']}, engine up after {result['started']:.0f} s, "
        f"{time.monotonic() - began:.0f} s in all"
    )
    yield Run(backend, result, asked)


def test_log_probabilities_and_greedy_tokens_are_those_of_one_rank(tp2):
    """In one batch: base rows, plain and routed adapters on all seven linears."""
    assert (
        tp2.result["executor"] == {"mp": "MultiprocExecutor", "ray": "RayExecutorV2"}[tp2.backend]
    )
    got = tp2.result["logprobs"]
    requests = tp2.requests
    diffs = [worst(g, r.logits) for g, r in zip(got, requests, strict=True)]
    print(f"TP=2 {tp2.backend}: max |dlogp| {max(diffs):.1e}; ", end="")
    print(", ".join(f"{r.label} {d:.1e}" for r, d in zip(requests, diffs, strict=True)))
    assert max(diffs) < BOUND
    for r, tokens in zip(requests, tp2.result["tokens"], strict=True):
        assert tokens == r.greedy or not r.greedy, r.label


def test_what_every_rank_refuses_is_refused(tp2):
    assert tp2.result["refused"] == (["unsupported_feature"] if tp2.backend == "ray" else [])


def test_tensors_from_memory_reach_every_rank(tp2):
    wanted = {r.label: r.greedy for r in tp2.requests}  # of the last prompt of each
    got = tp2.result["from_memory"]
    assert {"plain-a", "any-gate", "self-gated"} <= set(got)
    assert got == {label: wanted[label] for label in got}


def test_what_requests_say_reaches_every_rank(tp2):
    """Each answer is compared where it is made."""
    right = {key.split()[0] for key in tp2.result["conditioned"]}
    assert {"spans-a", "alora-a", "xlora_topk-a", *MADE} <= right


def test_every_rank_decides_the_same(tp2):
    """The sums that enter a gate and what leaves it, bit for bit, at every layer and step."""
    first, second = tp2.result["ranks"]
    assert [(name, what) for name, what, _ in first] == [(name, what) for name, what, _ in second]
    routed, partial = set(), []
    for (name, what, a), (_, _, b) in zip(first, second, strict=True):
        if what == "partial":
            partial.append((name, a, b))
            continue
        assert a.tobytes() == b.tobytes(), f"{name}: {what} differ by {np.abs(a - b).max()}"
        order = np.argsort(a, axis=1, kind="stable")
        assert np.array_equal(order, np.argsort(b, axis=1, kind="stable"))
        if what == "gated":
            routed.add(name.split(".", 2)[2])
    linears = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    assert {name.rsplit(".", 1)[1] for name in routed} == set(linears)
    assert len(routed) == 12  # all linears of three layers
    # Not by chance: each rank saw only a part of a row-parallel input, or had a part of A.
    shards = linears if tp2.backend == "ray" else ("o_proj", "down_proj")
    assert {name.rsplit(".", 1)[1] for name, _, _ in partial} == set(shards)
    assert all(not np.array_equal(a, b) for _, a, b in partial if a.any())


def test_gates_and_images_reach_every_rank(tp2):
    """Each answer is compared where it is made."""
    assert tp2.result["given"] > 8


def test_listens_on_loopback_only(tp2):
    assert {ip.removeprefix("::ffff:") for ip, _ in tp2.result["listening"]} <= {"127.0.0.1", "::1"}
