"""What must be equal, whatever the numbers are: each rung rests on the one below."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from integration_tests.engines import (
    base_path,
    greedy,
    lora,
    prompt_logprobs,
    recorded,
    run,
    tokens,
    worst,
)
from integration_tests.reference_model import logits, steady_prompt
from tests.make_adapters import random_adapter, router_spec
from vllm_lora_ext.adapters.model import RoutedAdapter
from vllm_lora_ext.adapters.readers.native import write_native
from vllm_lora_ext.adapters.registry import load_adapter
from vllm_lora_ext.routing import GateSpec

BASE, VOCABULARY = "base_llama", 512


@pytest.fixture(scope="module")
def config():
    return AutoConfig.from_pretrained(base_path(BASE))


@pytest.fixture(scope="module")
def routed(config) -> RoutedAdapter:
    return random_adapter(config, 21, specs=router_spec(experts=4, rank=3, k=2))


@pytest.fixture(scope="module")
def prompt(routed) -> list[int]:
    return steady_prompt(BASE, routed, 70, 5)


def ask(llm, prompt, adapter, folder) -> torch.Tensor:
    request = lora(folder.name, write_native(adapter, folder))
    return prompt_logprobs(llm, [(prompt, request)], VOCABULARY)[0]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert torch.isfinite(a).all() and torch.isfinite(b).all()
    return (a - b).abs().max().item()


def each(adapter: RoutedAdapter, change) -> RoutedAdapter:
    return dataclasses.replace(adapter, modules={n: change(m) for n, m in adapter.modules.items()})


def test_one_expert_with_gate_one_is_the_plain_adapter(llama, prompt, tmp_path):
    """Sigmoid weights would show; a softmax over one expert is one."""
    folder = recorded("plain-a").folder
    plain = load_adapter(folder)
    gate = GateSpec(source="router", blocks=(plain.rank,), score="softmax")
    one = each(plain, lambda m: dataclasses.replace(
        m, gate=gate, router_GK=torch.randn(1, m.a_RK.shape[1])))  # fmt: skip
    want = prompt_logprobs(llama, [(prompt, lora("plain", folder))], VOCABULARY)[0]
    assert difference(ask(llama, prompt, one, tmp_path / "one"), want) < 1e-4


@pytest.mark.parametrize("k", [1, 2, 4])
def test_equal_experts_are_one(llama, prompt, tmp_path, k):
    """All logits differ, all experts are the same: whatever is chosen, the sum is one expert."""
    plain = load_adapter(recorded("plain-a").folder)
    gate = router_spec(experts=4, rank=plain.rank, k=k)
    four = each(plain, lambda m: dataclasses.replace(
        m, a_RK=m.a_RK.repeat(4, 1), b_NR=m.b_NR.repeat(1, 4), gate=gate,
        router_GK=torch.randn(4, m.a_RK.shape[1])))  # fmt: skip
    want = prompt_logprobs(
        llama, [(prompt, lora("plain", recorded("plain-a").folder))], VOCABULARY
    )[0]
    assert difference(ask(llama, prompt, four, tmp_path / f"equal{k}"), want) < 1e-4


def test_order_of_experts_does_not_matter(llama, routed, prompt, tmp_path):
    def turn(m):
        order = torch.tensor([2, 0, 3, 1])
        rows = torch.cat([torch.arange(3) + 3 * e for e in order])
        return dataclasses.replace(
            m, a_RK=m.a_RK[rows], b_NR=m.b_NR[:, rows], router_GK=m.router_GK[order]
        )

    want = ask(llama, prompt, routed, tmp_path / "ordered")
    assert difference(ask(llama, prompt, each(routed, turn), tmp_path / "turned"), want) < 1e-4


def test_compiled_and_chunked_equal_eager_and_whole(llama, llama_eager, routed, prompt, tmp_path):
    """`llama` compiles and prefills 64 tokens at a time, `llama_eager` does neither."""
    want = ask(llama_eager, prompt, routed, tmp_path / "eager")
    assert difference(ask(llama, prompt, routed, tmp_path / "compiled"), want) < 1e-4


def test_alone_equals_mixed_and_cached_equals_first(llama, routed, prompt, tmp_path):
    """With every slot taken, which is where stock CPU gives base rows the last slot's adapter."""
    mine = lora("mixed", write_native(routed, tmp_path / "mixed"))
    others = [lora(f"plain{i}", recorded("plain-a").folder) for i in range(2)]
    others.append(lora("moe", recorded("loramoe-a").folder))
    alone = {a: prompt_logprobs(llama, [(prompt, a)], VOCABULARY)[0] for a in (mine, *others, None)}
    batch = [*alone] * 2
    for got, adapter in zip(prompt_logprobs(llama, [(prompt, a) for a in batch], VOCABULARY), batch,
                            strict=True):  # fmt: skip
        assert difference(got, alone[adapter]) < 1e-4
    first, second = (run(llama, [(prompt, a) for a in batch], greedy()) for _ in range(2))
    assert [tokens(o) for o in first] == [tokens(o) for o in second]
    assert all(o.num_cached_tokens >= 64 for o in second)


def test_poisoned_unused_slots_leak_nothing(llama, routed, prompt, tmp_path):
    """NaN in all that the adapter at work does not own: other slots, and rows past its own."""
    mine = lora("clean", write_native(routed, tmp_path / "clean"))
    want = [prompt_logprobs(llama, [(prompt, a)], VOCABULARY)[0] for a in (mine, None)]
    assert llama.collective_rpc(poison, args=(mine.lora_int_id,))[0] > 0
    llama.reset_prefix_cache()
    got = prompt_logprobs(llama, [(prompt, mine), (prompt, None)], VOCABULARY)
    assert max(difference(g, w) for g, w in zip(got, want, strict=True)) < 1e-4


def poison(worker, lora_id: int) -> int:
    """Runs in the engine: fills every weight buffer outside one adapter's slot with NaN."""
    manager = worker.model_runner.lora_manager._adapter_manager
    for other in [i for i in manager.lora_index_to_id if i not in (None, lora_id)]:
        manager._active_adapters.remove_oldest() if other not in manager._active_adapters else None
        manager.deactivate_adapter(other)
    slot, count = manager.lora_index_to_id.index(lora_id), 0
    for layer in manager.modules.values():
        site = getattr(layer, "site", None)
        if not hasattr(site, "a_SRK"):
            continue
        plan = site.plans[slot]
        for buffer, rows in ((site.a_SRK, "a_RK"), (site.router_SGK, "router_GK")):
            used = 0 if plan is None else len(getattr(plan, rows))
            keep = buffer[slot, :used].clone()
            buffer.fill_(float("nan"))
            buffer[slot, :used] = keep
            count += buffer.isnan().sum().item()
        for bt_SRN in site.bt_SRN:
            mine = bt_SRN[slot].clone()
            bt_SRN.fill_(float("nan"))
            bt_SRN[slot] = mine
    return count


def test_twelve_adapters_over_four_slots(llama, config, tmp_path):
    """LRU eviction and reload: every adapter answers the same each time round."""
    adapters = [
        lora(f"lru{i}", write_native(random_adapter(config, 100 + i), tmp_path / f"lru{i}"))
        for i in range(12)
    ]
    prompt = np.random.default_rng(0).integers(4, 500, 20).tolist()
    rounds = []
    for _ in range(3):
        outputs = [run(llama, [(prompt, a)], greedy(8, logprobs=1))[0] for a in adapters]
        rounds.append([tokens(o) for o in outputs])
        llama.reset_prefix_cache()
    assert rounds[0] == rounds[1] == rounds[2]
    assert len({tuple(t) for t in rounds[0]}) >= 8
    together = [run(llama, [(prompt, a) for a in adapters], greedy(8))][0]
    assert [tokens(o) for o in together] == rounds[0]


def test_new_base_weights_are_the_ones_that_answer(llama, prompt, tmp_path):
    """`reload_weights` makes new products of the base layers, beside which the adapters stay."""
    plain = recorded("plain-a").folder
    other = shutil.copytree(base_path(BASE), tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    scaled = {name: 1.2 * w if w.ndim == 2 else w for name, w in weights.items()}
    save_file(scaled, other / "model.safetensors", metadata={"format": "pt"})

    def check(base: str) -> None:
        llama.collective_rpc("reload_weights", kwargs={"weights_path": str(base_path(base))})
        llama.reset_prefix_cache()
        for adapter, request in ((None, None), (load_adapter(plain), lora("reloaded", plain))):
            (got,) = prompt_logprobs(llama, [(prompt, request)], VOCABULARY)
            assert worst(got, logits(base, adapter, prompt)) < 2e-3

    try:
        check(str(other))
    finally:
        check(BASE)  # as the other tests want it
