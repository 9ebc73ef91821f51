"""Malformed and missing adapters in an offline engine: the caller's error, nobody else's."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from integration_tests.engines import close, greedy, lora, make_engine, recorded, run, tokens
from tests.bad_adapters import BAD, GOOD, build_bad
from vllm_lora_ext.errors import AdapterError

pytestmark = pytest.mark.engine
PLAIN, MOE = recorded("plain-a"), recorded("loramoe-a")
# The engine `llama` has 64 router rows; `narrow` has 8.
HERE = [name for name in BAD if name != "router_too_large"]
_numbers = itertools.count(10_000)  # apart from the ids that `lora` gives out


def new(name: str, folder: Path | str, number: int | None = None) -> LoRARequest:
    return LoRARequest(name, number or next(_numbers), str(folder))


def ask(llm: Any, adapter: LoRARequest | None, fx: Any = PLAIN, n: int = 12) -> list[list[int]]:
    return [tokens(o) for o in run(llm, [(p, adapter) for p in fx.prompts], greedy(n))]


def refused(llm: Any, adapter: LoRARequest, *neighbours: LoRARequest | None) -> AdapterError:
    """The error of a call in which `adapter` stands last, after good requests."""
    batch = [(PLAIN.prompts[0], a) for a in (*neighbours, adapter)]
    with pytest.raises(AdapterError) as caught:
        run(llm, batch, greedy(2))
    return caught.value


def fingerprint(llm: Any) -> list[Any]:
    """Tokens and exact log-probabilities of a plain and a routed adapter and of the base."""
    adapters = [lora("plain-a", PLAIN.folder), lora("loramoe-a", MOE.folder), None]
    outputs = run(llm, [(PLAIN.prompts[1], a) for a in adapters], greedy(4, logprobs=5))
    return [
        (tokens(o), [{t: e.logprob for t, e in row.items()} for row in o.outputs[0].logprobs])
        for o in outputs
    ]


@pytest.fixture(scope="module")
def before(llama) -> list[Any]:
    fingerprint(llama)  # from here on the prompts come out of the prefix cache
    return fingerprint(llama)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> Iterator[Any]:
    """One slot, two adapters in vLLM's cache, 8 router rows, adapters from one folder only."""
    root = tmp_path_factory.mktemp("roots")
    llm = make_engine(
        "base_llama", enforce_eager=True, max_loras=1, max_cpu_loras=2,
        additional_config={"lora_ext": {"adapter_roots": [str(root)], "max_router_rows": 8}},
    )  # fmt: skip
    llm.root = root
    yield llm
    close(llm)


@pytest.mark.parametrize("name", HERE)
def test_refused_with_its_code_and_neighbours_untouched(llama, before, tmp_path, name):
    code = build_bad(name, tmp_path / name).code
    bad = new(f"bad-{name}", tmp_path / name)
    good = lora("plain-a", PLAIN.folder)
    error = refused(llama, bad, good, None)
    assert error.code == code
    assert "; fix: " in error.text
    assert refused(llama, bad).code == code  # still, not the base model
    assert fingerprint(llama) == before


@pytest.mark.parametrize("name", ["truncated", "a_nan", "router_nan", "other_base"])
def test_name_and_id_serve_once_the_folder_is_mended(llama, tmp_path, name):
    folder = tmp_path / name
    build_bad(name, folder)
    adapter = new(f"mended-{name}", folder)
    refused(llama, adapter)
    shutil.rmtree(folder)
    shutil.copytree(MOE.folder, folder)
    assert ask(llama, adapter, MOE) == MOE.greedy


def test_id_of_another_adapter(llama, before):
    first = new("first", PLAIN.folder)
    assert ask(llama, first) == PLAIN.greedy
    for other in (
        new("first", MOE.folder, first.lora_int_id), new("else", PLAIN.folder, first.lora_int_id)
    ):  # fmt: skip
        assert refused(llama, other).code == "id_in_use"
    assert ask(llama, first) == PLAIN.greedy
    assert fingerprint(llama) == before


@pytest.mark.parametrize("path", ["/no/such/folder", "no/such-folder", "no such/folder"])
def test_no_such_folder(llama, path):
    assert refused(llama, new(f"absent {path}", path)).code == "not_found"


def test_other_base(llama, tmp_path):
    code = refused(llama, new("of-qwen2", GOOD["meteora-a"])).code
    assert code in ("wrong_base", "shape_mismatch", "unknown_module")


def test_add_lora_raises_the_code(llama, tmp_path):
    build_bad("b_inf", tmp_path / "bad")
    with pytest.raises(AdapterError) as caught:
        llama.llm_engine.add_lora(new("added", tmp_path / "bad"))
    assert caught.value.code == "not_finite"


def test_files_may_go_once_they_were_read(narrow):
    """Four adapters, a cache of two, files deleted or broken: evicted ones answer as checked."""
    held = {}
    for i, fx in enumerate((PLAIN, MOE, PLAIN, MOE)):
        folder = narrow.root / f"held-{i}"
        shutil.copytree(fx.folder, folder)
        held[f"held-{i}"] = new(f"held-{i}", folder), fx
        assert ask(narrow, held[f"held-{i}"][0], fx) == fx.greedy
    for i in range(4):
        shutil.rmtree(narrow.root / f"held-{i}")
    build_bad("router_nan", narrow.root / "held-1")
    build_bad("truncated", narrow.root / "held-2")
    for _ in range(2):
        for adapter, fx in held.values():
            assert ask(narrow, adapter, fx) == fx.greedy
    assert [tokens(o) for o in run(narrow, [(PLAIN.prompts[0], None)], greedy(1))] == [
        [PLAIN.base_logits[0][-1].argmax().item()]
    ]


def test_removed_adapter_is_read_again(narrow):
    folder = narrow.root / "removed"
    shutil.copytree(PLAIN.folder, folder)
    adapter = new("removed", folder)
    assert ask(narrow, adapter) == PLAIN.greedy
    assert narrow.llm_engine.remove_lora(adapter.lora_int_id)
    shutil.rmtree(folder)
    assert refused(narrow, adapter).code == "not_found"


def test_load_inplace_replaces_once_and_refuses_bad_ones(narrow):
    shutil.copytree(PLAIN.folder, narrow.root / "one")
    shutil.copytree(MOE.folder, narrow.root / "two")
    build_bad("a_nan", narrow.root / "bad")
    adapter = new("inplace", narrow.root / "one")
    number = adapter.lora_int_id
    assert ask(narrow, adapter) == PLAIN.greedy
    bad = LoRARequest("inplace", number, str(narrow.root / "bad"), load_inplace=True)
    assert refused(narrow, bad).code == "not_finite"
    assert ask(narrow, adapter) == PLAIN.greedy
    second = LoRARequest("inplace", number, str(narrow.root / "two"), load_inplace=True)
    assert ask(narrow, second, MOE) == MOE.greedy
    shutil.rmtree(narrow.root / "two")
    assert ask(narrow, new("inplace", narrow.root / "two", number), MOE) == MOE.greedy


def test_limits_and_roots_of_the_server(narrow, tmp_path):
    build_bad("router_too_large", narrow.root / "wide")
    assert refused(narrow, new("wide", narrow.root / "wide")).code == "router_too_large"
    shutil.copytree(PLAIN.folder, tmp_path / "outside")
    (narrow.root / "link").symlink_to(tmp_path / "outside")
    for path in (tmp_path / "outside", narrow.root / "link", f"{narrow.root}/../outside", "../x"):
        assert refused(narrow, new(f"out {path}", path)).code == "path_not_allowed"
    weights = "adapter_model.safetensors"
    for name, store in (("linked", narrow.root / "blob"), ("linked-out", tmp_path / "blob")):
        shutil.copytree(PLAIN.folder, narrow.root / name)
        (narrow.root / name / weights).rename(store)
        (narrow.root / name / weights).symlink_to(store)
    assert refused(narrow, new("linked-out", narrow.root / "linked-out")).code == "path_not_allowed"
    assert ask(narrow, new("linked", narrow.root / "linked")) == PLAIN.greedy
    shutil.copytree(MOE.folder, narrow.root / "relative")
    assert ask(narrow, new("relative", "relative"), MOE) == MOE.greedy
