"""Merged adapters by name in a request: one real server, four slots, many mixes at once."""

from __future__ import annotations

import importlib.util
import random
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from integration_tests.engines import recorded
from integration_tests.reference_model import logits
from integration_tests.server import Server, base_with_tokenizer, command, free_port, serving
from integration_tests.soak import world
from integration_tests.soak.deaths import kill_part
from integration_tests.soak.report import soak
from vllm_lora_ext.adapters.registry import load_adapter
from vllm_lora_ext.merging import Factors, Pair, Term, load_factors, merge, save_peft
from vllm_lora_ext.merging.generate import ExpertLibrary, minilm
from vllm_lora_ext.merging.generate.embed import PACKAGE

pytestmark = pytest.mark.engine
BOUND = 2e-3
BASE = "base_llama"
PLAIN = recorded("plain-a")
NAMES = ("math", "code", "style")
PROMPTS = [torch.randint(4, 380, (n,), generator=torch.Generator().manual_seed(n)).tolist()
           for n in (7, 19, 33)]  # fmt: skip
CLIENTS, MIXES, SLOTS = 16, 20, 4
DESCRIBED = {
    "math": ("math", "Solves arithmetic"),
    "code": ("code", "Writes Python programs"),
    "style": ("style", "Answers like a pirate"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Three adapters of ranks 5, 6, 7 as strong as the recorded one, and a recipe over two."""
    root = tmp_path_factory.mktemp("mixes")
    shapes = load_factors(PLAIN.folder).modules
    for rank, name in enumerate(NAMES, start=5):
        draw = torch.Generator().manual_seed(rank)
        modules = {}
        for module, pair in shapes.items():
            n, k = pair.b_NR.shape[0], pair.a_RK.shape[1]
            size = float(pair.delta().norm()) / rank**0.5 / (n * k) ** 0.5
            a = torch.randn(rank, k, generator=draw)
            modules[module] = Pair(a, torch.randn(n, rank, generator=draw) * size)
        save_peft(Factors(modules, "base"), root / "adapters" / name)
    ExpertLibrary.build(DESCRIBED, minilm()).save(root / "adapters")
    (root / "weekly.yaml").write_text(
        "version: 1\nmerge_method: svd\noutput: {rank: 5}\n"
        "models: [{model: math, parameters: {weight: 0.7}}, {model: adapters/style}]\n"
    )
    return root


@pytest.fixture(scope="module")
def server(home) -> Iterator[Server]:
    settings = {
        "merge": {
            "adapters": {"style": str(home / "adapters" / "style")},
            "recipes": {"weekly": str(home / "weekly.yaml")},
            "store": str(home / "store"), "max_terms": 3,
            "describe": {
                "library": str(home / "adapters"), "model": str(embedding_model()), "top_k": 2,
            },
        },
    }  # fmt: skip
    argv = command(
        base_with_tokenizer(home / BASE), free_port(), settings, "--enforce-eager",
        "--max-loras", str(SLOTS), "--max-cpu-loras", str(SLOTS), "--max-lora-rank", "16",
        "--num-gpu-blocks-override", "12",  # so that long answers are put back
        "--lora-modules", *(f"{name}={home}/adapters/{name}" for name in NAMES[:2]),
        f"static={home}/weekly.yaml",
    )  # fmt: skip
    with serving(
        argv, home / "server.log", fork=True, VLLM_ALLOW_RUNTIME_LORA_UPDATING="1"
    ) as running:
        yield running


def embedding_model() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    assert found is not None and found.submodule_search_locations
    return Path(found.submodule_search_locations[0]) / "model"


def post(server: Server, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/{path}", json=body, timeout=120, trust_env=False)


def ask(server: Server, model: str, prompt: list[int], **more: Any) -> httpx.Response:
    body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0,
            "prompt_logprobs": 3, **more}  # fmt: skip
    return post(server, "completions", body)


@cache
def reference(method: str, terms: tuple[tuple[str, float], ...], options: tuple[Any, ...], i: int,
              adapters: Path) -> torch.Tensor:  # fmt: skip
    """Log-probabilities [T, V] of prompt i by transformers, with the merge made here."""
    merged = merge(
        method, [Term(load_factors(adapters / n), w, n) for n, w in terms], dict(options)
    )
    folder = adapters.parent / "wanted" / str(abs(hash((method, terms, options))))
    if not folder.exists():
        save_peft(merged.factors, folder)
    return torch.log_softmax(logits(BASE, load_adapter(folder), PROMPTS[i]).double(), -1)


@cache
def bare(i: int) -> torch.Tensor:
    return torch.log_softmax(logits(BASE, None, PROMPTS[i]).double(), -1)


def error_of(answer: httpx.Response, wanted: torch.Tensor) -> float:
    assert answer.status_code == 200, answer.text
    rows = answer.json()["choices"][0]["prompt_logprobs"][1:]
    return max(
        abs(entry["logprob"] - float(wanted[t, int(token)]))
        for t, row in enumerate(rows)
        for token, entry in row.items()
    )


def check(server, home, model, method, terms, options=(), **more) -> None:
    wanted = reference(method, terms, options, 1, home / "adapters")
    assert float((wanted - bare(1)).abs().max()) > 10 * BOUND  # an adapter one would notice
    assert error_of(ask(server, model, PROMPTS[1], **more), wanted) < BOUND


def listed(server: Server) -> set[str]:
    answer = httpx.get(f"{server.url}/v1/models", timeout=30, trust_env=False)
    return {card["id"] for card in answer.json()["data"]}


@pytest.mark.parametrize(
    "model, method, terms, options",
    [
        ("cat:math*0.6+code*0.4", "cat", (("code", 0.4), ("math", 0.6)), ()),
        ("cat:math+style*-0.3", "cat", (("math", 1.0), ("style", -0.3)), ()),
        ("svd[r=5]:math*0.6+code*0.4", "svd", (("code", 0.4), ("math", 0.6)), (("rank", 5),)),
        ("ties[d=0.4,r=8]:math+code", "ties", (("code", 1.0), ("math", 1.0)),
         (("density", 0.4), ("rank", 8))),
        ("lego[k=6]:math+style", "lego", (("math", 1.0), ("style", 1.0)), (("k", 6),)),
        ("recipe:weekly", "svd", (("math", 0.7), ("style", 1.0)), (("rank", 5),)),
    ],
)  # fmt: skip
def test_a_mix_answers_as_its_merge(server, home, model, method, terms, options):
    check(server, home, model, method, terms, options)


def test_a_description(server, home):
    text = "adds and multiplies numbers"
    weights = ExpertLibrary.load(home / "adapters").select(minilm()(text), k=2)
    assert next(iter(weights)) == "math"
    check(server, home, f'describe:"{text}"', "cat", tuple(weights.items()))


def test_lorax_s_field(server, home):
    given = {"ids": ["math", "math"], "weights": [0.5, 0.5], "merge_strategy": "linear"}
    refused = ask(server, "base", PROMPTS[0], merged_adapters=given)
    assert refused.status_code == 400 and refused.json()["error"]["type"] == "bad_mix"
    answer = ask(server, "math", PROMPTS[0], merged_adapters=given)
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "bad_value"
    given = {"ids": ["math"], "weights": [1.0], "merge_strategy": "linear"}
    options = (("compat", "lorax"),)
    check(server, home, "base", "linear", (("math", 1.0),), options, merged_adapters=given)


def test_spellings_of_one_mix_are_one_adapter(server):
    for model in ("cat:code*.25+math", "cat:math*1.00+code*0.25", "cat[l=1]:code*0.25+math*1"):
        assert ask(server, model, PROMPTS[0]).status_code == 200
    assert [name for name in listed(server) if "0.25" in name] == ["cat:code*0.25+math"]


def test_many_mixes_in_few_slots_at_once(server, home):
    weights = [((i % 5 + 1) / 5, (i // 5 + 1) / 4) for i in range(MIXES)]
    jobs: list[tuple[str, int, torch.Tensor]] = []
    for one, two in weights:
        terms = (("code", two), ("math", one))
        for i in range(len(PROMPTS)):
            wanted = reference("cat", terms, (), i, home / "adapters")
            jobs.append((f"cat:math*{one}+code*{two}", i, wanted))
    for i in range(len(PROMPTS)):
        jobs += [("base", i, bare(i))] * 4
        jobs += [("math", i, reference("cat", (("math", 1.0),), (), i, home / "adapters"))] * 4
    random.Random(0).shuffle(jobs)

    def run(job: tuple[str, int, torch.Tensor]) -> tuple[str, float]:
        model, i, wanted = job
        return model, error_of(ask(server, model, PROMPTS[i]), wanted)

    with ThreadPoolExecutor(CLIENTS) as pool:
        errors = list(pool.map(run, jobs))
    assert len(errors) == MIXES * 3 + 24
    assert max(error for _, error in errors) < BOUND, max(errors, key=lambda e: e[1])


def test_first_requests_at_once_merge_once(server, home):
    before = {p.name for p in (home / "store" / "store").iterdir()}
    with ThreadPoolExecutor(8) as pool:
        model = "svd[r=7]:math*0.33+code*0.44"
        answers = list(pool.map(lambda _: ask(server, model, PROMPTS[0]), range(8)))
    assert {a.status_code for a in answers} == {200}
    assert len({p.name for p in (home / "store" / "store").iterdir()} - before) == 1


@pytest.mark.parametrize(
    "model, status, code",
    [
        ("cat:math+nobody", 404, "not_found"),
        ("recipe:nothing", 404, "not_found"),
        ('describe:""', 400, "bad_mix"),
        ("cat:math-code*", 400, "bad_mix"),
        ("cat:../../etc/passwd+math", 400, "bad_mix"),
        ("tie:math+code*2", 400, "bad_mix"),
        ("cat:math*nan", 400, "bad_mix"),
        ("ties[d=7]:math+code", 400, "bad_value"),
        ("ties[dd=0.1]:math+code", 400, "unknown_key"),
        ("ties[compat=mergekit]:math+code", 400, "offline_only"),
        ("soups:math+code", 400, "offline_only"),
        ("cat:math+code+style*2+base", 400, "mix_limit"),
        ("cat:math+code+style*3", 400, "rank_too_large"),
        ("svd[r=17]:math+code+style", 400, "rank_too_large"),
        ("svd[r=16]:math+code+style", 200, ""),
    ],
)
def test_refusals(server, model, status, code):
    before = listed(server)
    answer = ask(server, model, PROMPTS[0])
    assert answer.status_code == status, answer.text
    if code:
        assert answer.json()["error"]["type"] == code
        assert listed(server) == before
    assert error_of(ask(server, "base", PROMPTS[0]), bare(0)) < BOUND


def test_a_recipe_as_the_path_of_an_adapter(server, home):
    terms, options = (("math", 0.7), ("style", 1.0)), (("rank", 5),)
    check(server, home, "static", "svd", terms, options)  # from --lora-modules
    body = {"lora_name": "mine", "lora_path": str(home / "weekly.yaml")}
    answer = post(server, "load_lora_adapter", body)
    assert answer.status_code == 200, answer.text
    check(server, home, "mine", "svd", terms, options)
    assert post(server, "unload_lora_adapter", {"lora_name": "mine"}).status_code == 200
    assert ask(server, "mine", PROMPTS[0]).status_code == 404
    (home / "wrong.yaml").write_text("version: 1\nmerge_method: cat\nmodel: []\n")
    body = {"lora_name": "wrong", "lora_path": str(home / "wrong.yaml")}
    answer = post(server, "load_lora_adapter", body)
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "unknown_key"
    assert ask(server, "wrong", PROMPTS[0]).status_code == 404


def test_an_unloaded_adapter_is_in_no_mix(server, home):
    body = {"lora_name": "late", "lora_path": str(home / "adapters" / "math")}
    assert post(server, "load_lora_adapter", body).status_code == 200
    check(server, home, "cat:late*0.5", "cat", (("math", 0.5),))
    assert post(server, "unload_lora_adapter", {"lora_name": "late"}).status_code == 200
    answer = ask(server, "cat:late*0.5", PROMPTS[0])
    assert answer.status_code == 404, answer.text


def test_an_adapter_s_overwritten_folder_is_in_no_mix(server, home):
    """What stands there is another version than the one that the name serves."""
    body = {"lora_name": "moved", "lora_path": str(home / "moved")}
    shutil.copytree(home / "adapters" / "math", home / "moved")
    assert post(server, "load_lora_adapter", body).status_code == 200
    check(server, home, "cat:moved*0.5", "cat", (("math", 0.5),))
    shutil.rmtree(home / "moved")
    shutil.copytree(home / "adapters" / "code", home / "moved")
    check(server, home, "cat:moved*0.5", "cat", (("math", 0.5),))
    answer = ask(server, "cat:moved*0.25", PROMPTS[0])
    assert answer.status_code == 409 and answer.json()["error"]["type"] == "files_changed"
    answer = post(server, "load_lora_adapter", body | {"load_inplace": True})
    assert answer.status_code == 200, answer.text
    check(server, home, "cat:moved*0.25", "cat", (("code", 0.25),))
    assert post(server, "unload_lora_adapter", {"lora_name": "moved"}).status_code == 200
    answer = post(server, "load_lora_adapter", body | {"lora_name": "cat:moved*0.25"})
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "bad_value"


def test_nothing_of_the_mixes_stays_behind(server, home):
    assert ask(server, "cat:math*0.11+code*0.12", PROMPTS[0]).status_code == 200
    assert server.process.poll() is None
    deadline = time.monotonic() + 20
    while any((home / "store" / "store").glob(".*.*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not list((home / "store" / "store").glob(".*.*"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_soak_in_short(server, home):
    """`make soak`, for a part of a minute, on a server that has seen all of the above."""
    report = soak(server, home / "soak", seconds=20, clients=8)
    print(report.table())
    grown = {what for what in report.faults() if what.startswith("MiB")}  # 5 s warm nobody up
    assert report.faults().keys() - grown == set()
    assert report.tally.requests["200"] > 0


def test_an_engine_that_is_killed_ends_what_waits_for_it(server, home):
    """The last of this server: a load in flight is answered, the server ends as stock's does."""
    assert kill_part(server, world.make(home / "deaths"), "EngineCore") == []
