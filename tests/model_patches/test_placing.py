"""Where an adapter's parts go in layers that vLLM has fused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.make_adapters import normal, random_adapter, random_module, router_spec
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.routing import delta_reference

LAYER = "model.layers.0.mlp.gate_up_proj"
GATE, UP = "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"


@pytest.fixture
def four_slices(harness: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A Llama whose `gate_up_proj` has four slices, for which adapters have two names, as Qwen3.5's
    `in_proj_qkvz` has: the first name stands for three."""
    from tests.model_patches.conftest import _start

    _start()
    import vllm.model_executor.models.llama as llama

    merged = llama.MergedColumnParallelLinear

    def build(*args: Any, output_sizes: list[int], **kwargs: Any) -> Any:
        half = output_sizes[0] // 2
        sizes = [half, half // 2, output_sizes[0] - half - half // 2, output_sizes[1]]
        return merged(*args, output_sizes=sizes, **kwargs)

    monkeypatch.setattr(llama, "MergedColumnParallelLinear", build)
    return harness


def test_fewer_names_than_slices(four_slices: Callable[..., Any]) -> None:
    """Plain and routed, both names, the first only, and the second only; plain ones with the first
    name as stock has it."""
    h = four_slices(max_loras=1, max_cpu_loras=1)
    config, x = h.config.model_config.hf_config, normal(np.random.default_rng(0), 5, 128)
    layer = h.manager.modules[LAYER]
    assert layer.n_slices == 4 and h.manager.packed_modules[LAYER] == [GATE, UP]
    for targets in (("gate_proj", "up_proj"), ("gate_proj",), ("up_proj",)):
        for kind in ("plain", "routed"):
            options = {} if kind == "routed" else {"plain": True}
            adapter = made(config, targets, **options)
            request = h.save("-".join((kind, *targets)), adapter)
            h.worker.load(request, None, ())
            want = torch.zeros(5, sum(layer.output_slices))
            half = want.shape[1] // 2
            for name, columns in ((GATE, slice(0, half)), (UP, slice(half, None))):
                if name in adapter.modules:
                    want[:, columns] = delta_reference(adapter.modules[name], x)
            torch.testing.assert_close(h.delta(LAYER, request, x), want, rtol=1e-4, atol=1e-4)
            # Stock takes the slices behind a missing first part for the second's own.
            if kind == "plain" and GATE in adapter.modules:
                same_as_stock(layer, adapter, want, x)
            h.worker.remove_adapter(request.lora_int_id)


def made(config: Any, targets: tuple[str, ...], plain: bool = False) -> RoutedAdapter:
    adapter = random_adapter(config, 3, targets=targets)
    if not plain:
        return adapter
    modules = {n: RoutedModule(m.a_RK, m.b_NR) for n, m in adapter.modules.items()}
    return RoutedAdapter(modules, system="plain")


def same_as_stock(layer: Any, adapter: RoutedAdapter, want: torch.Tensor, x: torch.Tensor) -> None:
    """Stock spreads the two pairs over the slices in the same way."""
    from vllm.lora.layers import MergedColumnParallelLinearWithLoRA

    pairs = [adapter.modules.get(name) for name in (GATE, UP)]
    a, b = MergedColumnParallelLinearWithLoRA.expand_packed_lora(
        layer, [m and m.a_RK for m in pairs], [m and m.b_NR for m in pairs]
    )
    parts = zip(a, b, layer.output_slices, strict=True)
    stock = [x.new_zeros(5, n) if a is None else x @ a.T @ b.T for a, b, n in parts]
    torch.testing.assert_close(torch.cat(stock, 1), want, rtol=1e-4, atol=1e-4)


def test_a_part_of_another_size_is_refused(four_slices: Callable[..., Any]) -> None:
    h = four_slices()
    adapter = made(h.config.model_config.hf_config, ("gate_proj", "up_proj"))
    cut = dataclasses.replace(adapter.modules[GATE], b_NR=adapter.modules[GATE].b_NR[1:])
    swapped = adapter.modules | {GATE: cut}
    with pytest.raises(AdapterError) as caught:
        h.worker.load(h.save("odd", RoutedAdapter(swapped, system="random")), None, ())
    assert caught.value.code == "shape_mismatch"


QKVZ = "model.layers.0.linear_attn.in_proj_qkvz"
NAMES = ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"]


@pytest.fixture
def qwen(harness: Callable[..., Any], tmp_path: Path) -> tuple[Any, Any]:
    """A tiny Qwen3.5, whose linear attention has two names for four slices, and what makes it in
    transformers."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    config = Qwen3_5TextConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"], num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, linear_key_head_dim=16, linear_value_head_dim=16,
        linear_num_key_heads=2, linear_num_value_heads=4, max_position_embeddings=64,
    )  # fmt: skip

    def model() -> Any:
        torch.manual_seed(0)
        return Qwen3_5ForCausalLM(config).float().eval()

    config.architectures = ["Qwen3_5ForCausalLM"]
    config.save_pretrained(tmp_path / "qwen")
    return harness(model=str(tmp_path / "qwen"), max_loras=3, max_cpu_loras=3), model


def test_qwen3_5_as_peft_computes_it(qwen: tuple[Any, Any], tmp_path: Path) -> None:
    """Rows of a PEFT adapter, of a routed one and of the base in one step, at every fused layer."""
    from peft import LoraConfig, get_peft_model
    from vllm.lora.request import LoRARequest

    h, model = qwen
    torch.manual_seed(1)
    lora = LoraConfig(r=6, lora_alpha=9, target_modules=NAMES, init_lora_weights=False)
    peft = get_peft_model(model(), lora)
    peft.save_pretrained(tmp_path / "peft")
    adapted = peft.get_submodule("base_model.model.model.layers.0.linear_attn")
    rng, before = np.random.default_rng(0), QKVZ.rpartition(".")[0]
    sizes = {n: adapted.get_submodule(n).get_delta_weight("default").shape for n in NAMES}
    routed = {
        f"{before}.{n}": random_module(rng, sizes[n][1], sizes[n][0], router_spec(experts=3))
        for n in ("in_proj_qkv", "in_proj_b")
    }
    requests = (
        LoRARequest("peft", 50, str(tmp_path / "peft")),
        h.save("routed", RoutedAdapter(routed, "random")),
        None,
    )
    for request in requests[:2]:
        h.worker.load(request, None, ())
    h.step(*requests * 3)
    packed = {QKVZ: NAMES[:2], f"{before}.in_proj_ba": NAMES[2:4], f"{before}.out_proj": NAMES[4:]}
    assert h.manager.modules[QKVZ].n_slices == 4
    for layer, names in packed.items():
        width, wrapped = sizes[names[0]][1], h.manager.modules[layer]
        x_TK = normal(rng, 9, width)
        got = wrapped._apply_lora_to_output(x_TK, torch.zeros(9, sum(sizes[n][0] for n in names)))
        deltas = [adapted.get_submodule(n).get_delta_weight("default") for n in names]
        theirs = x_TK @ torch.cat(deltas).T.detach()
        ours = torch.cat([
            delta_reference(routed[f"{before}.{n}"], x_TK) if f"{before}.{n}" in routed
            else x_TK.new_zeros(9, sizes[n][0]) for n in names
        ], 1)  # fmt: skip
        assert theirs.abs().max() > 0.01
        row = torch.arange(9)[:, None] % 3
        want = torch.where(row == 0, theirs, torch.where(row == 1, ours, 0.0))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_qwen3_5_with_a_defect(qwen: tuple[Any, Any], tmp_path: Path) -> None:
    """B of three slices together must be as wide as they are."""
    h, _ = qwen
    name = QKVZ.replace("qkvz", "qkv")
    width = {"in_proj_qkv": 127, "in_proj_z": 64}
    modules = {
        QKVZ.replace("in_proj_qkvz", n): RoutedModule(torch.ones(4, 64), torch.ones(out, 4))
        for n, out in width.items()
    }
    with pytest.raises(AdapterError, match=name) as caught:
        h.worker.load(h.save("odd", RoutedAdapter(modules, "plain")), None, ())
    assert caught.value.code == "shape_mismatch"
