"""Attention over earlier A x, without an engine: the layers that vLLM gives a KV cache, what a slot
adds, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.forward_context import set_forward_context
from vllm.lora.request import LoRARequest

from vllm_lora_ext.conditions.recipe import Part, Recipe
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.rank_attention import NAME, RankAttention
from vllm_lora_ext.routing import GateSpec, attention_reference

ON = {"rank_attention": {"heads": 2, "head_size": 32}}
SPEC = GateSpec("attention", blocks=(3, 3))
LINEARS = {
    "self_attn.qkv_proj": 3,
    "self_attn.o_proj": 1,
    "mlp.gate_up_proj": 2,
    "mlp.down_proj": 1,
}


def kept(h: Any) -> dict[str, Any]:
    layers = h.config.compilation_config.static_forward_context
    return {name: layer for name, layer in layers.items() if NAME in name}


def test_every_slice_has_a_cache(harness: Any) -> None:
    h = harness(ON)
    names = [
        f"model.layers.{i}.{linear}.{NAME}_{'abc'[s]}"
        for i in range(3) for linear, slices in LINEARS.items() for s in range(slices)
    ]  # fmt: skip
    assert list(kept(h)) == names
    spec = kept(h)[names[0]].get_kv_cache_spec(h.config)
    assert (spec.num_kv_heads, spec.head_size) == (2, 32)
    assert not kept(harness())


def test_refused_without_the_setting_and_beyond_it(harness: Any) -> None:
    small = harness()
    with pytest.raises(AdapterError, match='the setting "rank_attention"') as caught:
        small.worker.add_adapter(small.random("one", specs=SPEC))
    assert caught.value.code == "unsupported_feature"
    h = harness(ON)
    for blocks in ((2, 2, 2), (33,)):
        one = h.random(f"wide{len(blocks)}", specs=GateSpec("attention", blocks=blocks))
        with pytest.raises(AdapterError, match="2 heads of 32") as caught:
            h.worker.add_adapter(one)
        assert caught.value.code == "unsupported_feature"


class WholeStep:
    """Stands in for vLLM's attention: the step is one sequence, from its first token on."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.seen.append(torch.stack([q, k, v]))
        heads = [x.unflatten(1, (2, 32)).transpose(0, 1) for x in (q, k, v)]
        scale_free = torch.nn.functional.scaled_dot_product_attention
        return scale_free(*heads, is_causal=True, scale=1.0).transpose(0, 1).flatten(1)


def test_what_a_slot_adds(harness: Any) -> None:
    h = harness(ON, max_loras=3, max_cpu_loras=3)
    one, plain = h.random("one", specs=SPEC), h.random("plain", specs=GateSpec())
    for request in (one, plain):
        h.worker.add_adapter(request)
    name = "model.layers.1.self_attn.qkv_proj"
    attention = h.manager._attention
    stands = attention._layers[name] = [WholeStep() for _ in range(3)]
    layer, x_TK = h.manager.modules[name], torch.randn(6, 128)
    y_TN = x_TK.new_zeros(6, sum(layer.output_slices))

    def added(*rows: Any, metadata: Any = "some") -> torch.Tensor:
        h.step(*rows)
        with set_forward_context(metadata, h.config, num_tokens=6):
            return layer._apply_lora_to_output(x_TK, y_TN.clone())

    from vllm_lora_ext.adapters import load_adapter

    modules = load_adapter(one.lora_path).modules
    parts = [modules[f"model.layers.1.self_attn.{n}_proj"] for n in "qkv"]
    z_TR = [x_TK @ m.a_RK.t() for m in parts]
    without = torch.cat([z @ m.b_NR.t() for z, m in zip(z_TR, parts, strict=True)], dim=1)
    o_TR = [
        attention_reference(z, m.attention_PR, 2) for z, m in zip(z_TR, parts, strict=True)
    ]  # fmt: skip
    want = without + torch.cat([o @ m.b_NR.t() for o, m in zip(o_TR, parts, strict=True)], dim=1)
    torch.testing.assert_close(added(*[one] * 6), want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(added(*[one] * 6, metadata=None), without, atol=1e-4, rtol=1e-4)
    before = len(stands[0].seen)
    added(*[plain] * 6)
    added(*[None] * 6)
    assert len(stands[0].seen) == before, "nothing in steps without its rows"
    mixed, alone = added(one, None, plain, one, None, one), added(*[plain] * 6)
    assert (stands[0].seen[-1][:, [1, 2, 4]] == 0).all(), "rows of others write zeros"
    assert (mixed[[1, 4]] == 0).all() and torch.equal(mixed[2], alone[2])


def test_nothing_of_it_stays(harness: Any) -> None:
    h = harness(ON, max_loras=1)
    one, other = h.random("one", specs=SPEC), h.random("other", specs=GateSpec())
    site = h.manager.modules["model.layers.0.mlp.down_proj"].site
    before = len(site.after)
    h.worker.add_adapter(one)
    h.step(one)
    assert len(site.after) == before + 1
    h.worker.add_adapter(other)
    h.step(other)
    assert len(site.after) == before
    h.step(one)
    assert len(site.after) == before + 1


def test_it_is_no_part_of_a_mix(harness: Any) -> None:
    h = harness(ON)
    one = h.random("one", specs=SPEC)
    h.worker.add_adapter(one)
    version = h.worker.versions()[one.lora_int_id].version
    recipe = Recipe((Part(one.lora_name, one.lora_int_id, one.lora_path, version, 0.5),))
    with pytest.raises(AdapterError, match="cannot be one of several, or scaled") as caught:
        h.worker.add_adapter(LoRARequest(recipe.name, (1 << 30) + (1 << 29) + 1, recipe.path()))
    assert caught.value.code == "unsupported_feature"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}, "one rank"),
        ({"runner": "pooling"}, "generates"),
        ({"kv_cache_dtype": "fp8"}, "the model's dtype"),
    ],
)
def test_engines_that_cannot(options: dict[str, Any], words: str, harness: Any) -> None:
    with pytest.raises(AdapterError, match=words) as caught:
        harness(ON, **options)
    assert caught.value.code == "bad_settings"


def test_heads_that_no_backend_takes(harness: Any) -> None:
    with pytest.raises(AdapterError, match="choose another head_size") as caught:
        harness({"rank_attention": {"heads": 2, "head_size": 24}})
    assert caught.value.code == "bad_settings"


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_what_goes_to_a_gpu_is_page_locked_before_a_step(kind: str, monkeypatch: Any) -> None:
    """Or a step that activates the adapter would wait for its copy."""
    locked: list[tuple[int, ...]] = []

    def pin(t: torch.Tensor) -> torch.Tensor:
        locked.append(tuple(t.shape))
        return t

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    own: Any = RankAttention.__new__(RankAttention)
    own._step = SimpleNamespace(device=SimpleNamespace(type=kind))
    own._layers = {"layer": []}
    module: Any = SimpleNamespace(attention_PR=torch.ones(18, 6), gate=SPEC)
    found = own.projections("layer", [None, module])
    assert list(found) == [1] and locked == ([(18, 6)] if kind == "cuda" else [])
