"""What a model has: layers that it leaves out, and messages that name the ones it has."""

from __future__ import annotations

import pytest
import torch
from bad_adapters import GOOD
from peft_folders import IDS, WEIGHTS, make, of_peft
from safetensors.torch import load_file, save_file

from vllm_lora_ext.adapters import check_fits, load_adapter
from vllm_lora_ext.adapters.checks import without_drafter
from vllm_lora_ext.adapters.hf import apply_adapter, model_shapes
from vllm_lora_ext.errors import AdapterError

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def base(bases):
    return bases["base_llama"]


def add_layers(folder, *modules):
    """Layers of the same shapes as `up_proj` of the first layer, under other names."""
    tensors = load_file(folder / WEIGHTS)
    for module in modules:
        for letter in "AB":
            like = tensors[f"base_model.model.model.layers.0.mlp.up_proj.lora_{letter}.weight"]
            tensors[f"base_model.model.{module}.lora_{letter}.weight"] = torch.ones_like(like)
    save_file(tensors, folder / WEIGHTS)


class TestDrafter:
    def test_is_left_out(self, base, tmp_path):
        make(tmp_path, base)
        add_layers(tmp_path, "mtp.layers.0.mlp.up_proj", "model.mtp.0.up_proj")
        want, shapes = of_peft(tmp_path, base), model_shapes(base)
        adapter = load_adapter(tmp_path)
        with pytest.raises(AdapterError, match="unknown_module"):
            check_fits(adapter, shapes, torch.float32)
        with apply_adapter(base, without_drafter(adapter, shapes)):
            assert (base(IDS).logits - want).abs().max() <= 1e-5

    def test_by_the_models_own_list(self, base, tmp_path):
        make(tmp_path, base)
        add_layers(tmp_path, "model.draft.0.up_proj")
        want, shapes = of_peft(tmp_path, base), model_shapes(base)
        adapter = load_adapter(tmp_path)
        with pytest.raises(AdapterError, match="unknown_module"):
            check_fits(without_drafter(adapter, shapes), shapes, torch.float32)
        with apply_adapter(base, without_drafter(adapter, shapes, ["draft."])):
            assert (base(IDS).logits - want).abs().max() <= 1e-5

    def test_stays_where_the_model_has_it(self, base, tmp_path):
        make(tmp_path, base)
        add_layers(tmp_path, "mtp.layers.0.mlp.up_proj")
        adapter = load_adapter(tmp_path)
        has = {**model_shapes(base), "mtp.layers.0.mlp.up_proj": (1, 1)}
        assert without_drafter(adapter, has) is adapter
        assert without_drafter(adapter, has, ["model.layers."]) is adapter

    @pytest.mark.parametrize("name", ["model.layers.9.mlp.up_proj", "smtp.layers.0.mlp.up_proj"])
    def test_other_layers_are_still_unknown(self, name, base, tmp_path):
        make(tmp_path, base)
        add_layers(tmp_path, name)
        shapes = model_shapes(base)
        with pytest.raises(AdapterError, match="unknown_module"):
            check_fits(without_drafter(load_adapter(tmp_path), shapes), shapes, torch.float32)

    def test_blocks_of_experts_too(self, bases):
        folder = GOOD["plain-a"].parents[1] / "mixlora-a/adapter"
        adapter = load_adapter(folder)
        shapes = model_shapes(bases[adapter.base_model])
        assert adapter.blocks and without_drafter(adapter, shapes, ["model.layers."]) is adapter
        gone = without_drafter(
            adapter, {n: s for n, s in shapes.items() if ".0." in n}, ["model.layers."]
        )
        assert all(".0." in name for name in (*gone.blocks, *gone.modules)) and gone.blocks

    def test_nothing_else_is_no_adapter(self, base, tmp_path):
        make(tmp_path, base)
        with pytest.raises(AdapterError, match="empty_adapter"):
            without_drafter(load_adapter(tmp_path), {}, ["model."])


class TestUnknownLayers:
    def refusal(self, shapes):
        with pytest.raises(AdapterError) as caught:
            check_fits(load_adapter(GOOD["plain-a"]), shapes, torch.float32)
        assert caught.value.code == "unknown_module"
        return caught.value.text

    def test_are_told_what_the_model_has(self, base):
        shapes = {n: s for n, s in model_shapes(base).items() if "q_proj" not in n}
        text = self.refusal(shapes)
        assert "model.layers.*.self_attn.k_proj (0 to 2)" in text
        assert f"{len(shapes)} layers" in text

    def test_also_where_none_of_the_adapters_is_there(self):
        layers = ["language_model.layers.0.qkv", "language_model.layers.1.qkv", "head"]
        text = self.refusal(dict.fromkeys(layers, (1, 1)))
        assert "3 layers" in text and "language_model.layers.*.qkv (0 to 1)" in text
        assert "head" in text and "none" not in text

    def test_and_that_it_has_none(self):
        text = self.refusal({})
        assert "no layer" in text and "example" not in text
