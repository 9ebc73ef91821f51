"""A tiny LLaVA end to end: adapters on its language model, tokens of images among the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from integration_tests import conditioned
from integration_tests.conditioned import Case, ask, check, check_beginnings, preempted
from integration_tests.engines import close, lora, make_engine
from integration_tests.vision import (
    HERE,
    LANGUAGE,
    Asked,
    Look,
    Seer,
    by_kind,
    in_language_model,
    llava,
    trained,
)
from tests.make_adapters import random_adapter, router_spec
from tests.make_formats import write_mixlora
from vllm_lora_ext.adapters import load_adapter
from vllm_lora_ext.adapters.readers.native import write_native
from vllm_lora_ext.errors import AdapterError

pytestmark = pytest.mark.engine
PATTERN = r".*language_model.*\.(q_proj|v_proj|down_proj|gate_proj)"
SPLIT = {
    "adapters": [{"name": "seer", "modality": "image"}, {"name": "reader", "modality": "text"}]
}


def text(seed: int, length: int) -> tuple[int, ...]:
    return tuple(int(t) for t in np.random.default_rng(seed).integers(4, 160, length))


@pytest.fixture(scope="module")
def seer(tmp_path_factory: pytest.TempPathFactory) -> Seer:
    return llava(tmp_path_factory.mktemp("llava") / "base")


@pytest.fixture(scope="module")
def looks(seer: Seer) -> dict[str, Look]:
    red, green, blue = seer.pictures(3)
    one = Look((*text(0, 5), HERE, *text(1, 6)), (red,))
    return {
        "no image": Look(text(2, 20)),
        "one": one,
        "other": Look(one.ids, (green,)),
        "one, longer": Look((*one.ids, *text(3, 40)), (red,)),
        "several": Look((HERE, *text(4, 9), HERE, HERE, *text(5, 4)), (green, red, blue)),
        "in chunks": Look((*text(6, 50), HERE, *text(7, 70), HERE, *text(8, 9)), (blue, red)),
    }


@pytest.fixture(scope="module")
def wardrobe(
    seer: Seer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Any, Any, Any]]:
    """Name → what a request names, the adapter, and the model under it where PEFT has made it."""
    root = tmp_path_factory.mktemp("adapters")
    nets = {
        name: trained(seer.net, root / name, PATTERN, seed=i)
        for i, name in enumerate(("seer", "reader"))
    }
    text_config = seer.net.config.text_config
    adapter = in_language_model(random_adapter(text_config, 3, router_spec()))
    write_native(adapter, root / "routed")
    write_mixlora(root / "mixlora", 4, LANGUAGE)
    folders = {path.name: path for path in root.iterdir()}
    folders["mmlora"] = conditioned.FIXTURES / "conditioned" / "mmlora-a" / "adapter"
    return {
        name: (lora(name, folder), in_language_model(load_adapter(folder)), nets.get(name))
        for name, folder in folders.items()
    }


@pytest.fixture(scope="module")
def cases(seer: Seer, looks: dict[str, Look], wardrobe: dict[str, Any]) -> list[Case]:
    asked = []
    for key, look in looks.items():
        asked.append(Asked(f"base, {key}", look))
        for name, (request, adapter, net) in wardrobe.items():
            wears = () if net else (adapter,)
            asked.append(Asked(f"{name}, {key}", look, wears, request, net=net))
        split = by_kind(wardrobe["seer"][1], "image"), by_kind(wardrobe["reader"][1], "text")
        asked.append(Asked(f"split, {key}", look, split, says=SPLIT))
    return [one.case(seer) for one in asked]


@pytest.fixture(scope="module")
def llm(seer: Seer, wardrobe: dict[str, Any]) -> Iterator[Any]:
    engine = make_engine(
        seer.folder, skip_tokenizer_init=False, enforce_eager=True, enable_prompt_embeds=True,
        limit_mm_per_prompt={"image": 3}, max_loras=6,
    )  # fmt: skip
    for request, *_ in wardrobe.values():
        engine.llm_engine.add_lora(request)
    yield engine
    close(engine)


def test_the_cases_tell_adapters_and_images_apart(cases: list[Case]) -> None:
    last = {case.key: torch.log_softmax(case.logits[0], -1) for case in cases}
    names = ("base", "seer", "reader", "routed", "mixlora", "mmlora", "split")
    for look in ("one", "several", "in chunks"):
        for i, one in enumerate(names):
            for other in names[:i]:
                moved = (last[f"{one}, {look}"] - last[f"{other}, {look}"]).abs().max()
                assert moved > 0.02, (one, other, look)
    for name in names:
        assert (last[f"{name}, one"] - last[f"{name}, other"]).abs().max() > 0.02, name


def test_numbers_of_transformers(llm: Any, cases: list[Case]) -> None:
    """Everybody in one batch, more adapters than slots, then alone; prompts of several steps."""
    shuffled = [cases[i] for i in np.random.default_rng(0).permutation(len(cases))]
    check(shuffled, ask(llm, shuffled, skip_reading_prefix_cache=True))
    for case in cases[-8:]:
        check([case], ask(llm, [case], skip_reading_prefix_cache=True))
    check(shuffled, ask(llm, shuffled))
    outputs = ask(llm, shuffled)
    check(shuffled, outputs)
    found = {c.key: o.num_cached_tokens for c, o in zip(shuffled, outputs, strict=True)}
    assert min(n for key, n in found.items() if "in chunks" in key) >= 128


def test_text_that_only_one_kind_acts_on_shares_the_base(
    llm: Any, cases: list[Case], looks: dict[str, Look]
) -> None:
    """Before the first image, an adapter of images adds nothing."""
    assert llm.reset_prefix_cache()
    only = {"adapters": [{"name": "seer", "modality": "image"}]}
    prompt = looks["in chunks"].prompt
    base = Case("", prompt, [0], torch.empty(0, 160))
    assert [ask(llm, [c])[0].num_cached_tokens for c in (base, base)] == [0, 160]
    seeing = Case("", prompt, [0], torch.empty(0, 160), says=only)
    assert ask(llm, [seeing])[0].num_cached_tokens == 32


def test_after_a_preemption(llm: Any, cases: list[Case]) -> None:
    some = [c for c in cases if "several" in c.key or "one, longer" in c.key][:8]
    check_beginnings(some, preempted(llm, some))


def test_embeddings_in_the_place_of_an_image(
    llm: Any, seer: Seer, looks: dict[str, Look], cases: list[Case]
) -> None:
    """The same rows as embeddings, with `modality_spans`, are the same request."""
    look, ids = looks["several"], looks["several"].expanded(seer)
    pixels = seer.processor.image_processor(list(look.images), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        embeds = seer.net.get_input_embeddings()(torch.tensor(ids)).clone()
        seen = seer.net.get_image_features(pixel_values=pixels)
        seen = torch.cat(list(getattr(seen, "pooler_output", seen)))
        embeds[torch.tensor(ids) == HERE] = seen
    spans = [[t, t + 1] for t, token in enumerate(ids) if token == HERE]
    by_key = {case.key: case for case in cases}
    for name in ("mmlora", "split"):
        case = by_key[f"{name}, several"]
        says = case.says | {"modality_spans": {"image": spans}}
        same = Case(case.key, embeds, case.answer, case.logits, case.adapter, says)
        check([same], ask(llm, [same], skip_reading_prefix_cache=True))
        check([same, case], ask(llm, [same, case]))


def test_the_authors_numbers_on_the_language_model(llm: Any) -> None:
    """MM-LoRA's own requests, ids and embeddings; its language model is LLaVA's."""
    recorded = conditioned.images()
    check(recorded, ask(llm, recorded, skip_reading_prefix_cache=True))
    check(recorded, ask(llm, recorded))


def test_a_default_adapter_for_images(
    llm: Any, cases: list[Case], wardrobe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's `--default-mm-loras`, beside rows of the base and of a routed adapter."""
    # Stock numbers such adapters from 1, and a number means one adapter.
    first = [request for request, *_ in wardrobe.values() if request.lora_int_id == 1]
    beside = next(n for n in ("routed", "mixlora") if wardrobe[n][0] not in first)
    by_key = {case.key: case for case in cases}
    some = [replace(by_key[f"seer, {look}"], adapter=None) for look in ("one", "several")]
    some += [by_key["base, no image"], by_key[f"{beside}, one"], by_key[f"{beside}, several"]]
    config = llm.llm_engine.vllm_config.lora_config
    default = {"image": wardrobe["seer"][0].lora_path}
    monkeypatch.setattr(config, "default_mm_loras", default)
    try:
        for request in first:
            llm.llm_engine.remove_lora(request.lora_int_id)
        check(some, ask(llm, some, skip_reading_prefix_cache=True))
        check(some, ask(llm, some))
    finally:
        llm.llm_engine.remove_lora(1)
        for request in first:
            llm.llm_engine.add_lora(request)


def test_what_is_wrong_is_refused(
    llm: Any, seer: Seer, looks: Any, cases: Any, tmp_path: Any
) -> None:
    says = {"modality_spans": {"image": [[1, 3]]}}
    with pytest.raises(Exception, match="beside inputs of that kind") as caught:
        adapter = conditioned.adapter("mmlora-a")
        ask(llm, [Case("", looks["one"].prompt, [0], torch.empty(0, 160), adapter, says)])
    assert AdapterError.parse(str(caught.value)).code == "bad_value"
    trained(seer.net, tmp_path / "tower", r".*vision_tower.*q_proj")
    with pytest.raises(AdapterError, match="--enable-tower-connector-lora") as refused:
        llm.llm_engine.add_lora(lora("tower", tmp_path / "tower"))
    assert refused.value.code == "unsupported_feature"
    check(cases[:4], ask(llm, cases[:4]))
