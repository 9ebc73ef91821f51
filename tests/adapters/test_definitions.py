"""Every format in a whole model: `apply_adapter` against the definitions written a second time.

Shapes are drawn at random: 2 to 7 experts (by layer where the format allows), k from 1 to all,
ranks 3, 6 and 12, rsLoRA, a subset of the linears and of the layers, both tiny base models.
"""

from __future__ import annotations

import definitions
import pytest
import torch
from definitions import Folder, Layer
from make_formats import FORMATS, system_of, write_random

from vllm_lora_ext.adapters import load_adapter, write_native
from vllm_lora_ext.adapters.hf import apply_adapter
from vllm_lora_ext.convert import differing

IDS = torch.randint(4, 380, (1, 7), generator=torch.Generator().manual_seed(0))
SEEDS = (1, 2, 3)


def layer_hook(layer):
    def add(module, args, output):
        tokens = args[0].reshape(-1, args[0].shape[-1])
        rows = torch.stack([definitions.delta(layer, x) for x in tokens])
        return output + rows.reshape(output.shape).to(output.dtype)

    return add


def block_hook(folder, name, act):
    def replace(module, args, output):
        tokens, weights = args[0].reshape(-1, args[0].shape[-1]), {
            linear: getattr(module, linear).weight
            for linear in ("gate_proj", "up_proj", "down_proj")
        }  # fmt: skip
        rows = [definitions.mixlora_block(folder, name, x, weights, act) for x in tokens]
        return torch.stack(rows).reshape(output.shape).to(output.dtype)

    return replace


def logits_by_definition(model, folder):
    handles = []
    for name in folder.layers():
        hook = layer_hook(Layer(folder, name))
        handles.append(model.get_submodule(name).register_forward_hook(hook))
    for name in folder.blocks():
        hook = block_hook(folder, name, model.config.hidden_act)
        handles.append(model.get_submodule(name).register_forward_hook(hook))
    assert handles
    logits = model(IDS).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("base", ["base_llama", "base_qwen2"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_random_adapter_in_a_model(name, base, seed, bases, tmp_path):
    folder, model = write_random(name, tmp_path / "adapter", seed, base), bases[base]
    adapter = load_adapter(folder)
    if name != "native":
        assert adapter.system == system_of(name)
    assert adapter.base_model == base
    plain = model(IDS).logits
    want = logits_by_definition(model, Folder(folder))
    with apply_adapter(model, adapter):
        got = model(IDS).logits
    moved, error = (want - plain).abs().mean().item(), (got - want).abs().max().item()
    print(f"{name}, {base}, {seed}: moved {moved:.2f}, largest difference {error:.1e}")
    assert moved > 0.005
    assert error < 1e-4
    copy = load_adapter(write_native(adapter, tmp_path / "native"))
    assert not differing(adapter, copy)
