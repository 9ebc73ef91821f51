"""Readers of routed systems at the corners of their shapes, against `tests/definitions.py`."""

from __future__ import annotations

import json

import make_routed as make
import numpy as np
import pytest
import torch
from definitions import Folder, Layer, delta
from make_adapters import normal

from vllm_lora_ext.adapters import check_fits, load_adapter, write_native
from vllm_lora_ext.adapters.hf import delta_reference, model_shapes

TOKENS = 9


CASES = {
    "smora": (make.write_smora, {}),
    "smora one rank": (make.write_smora, {"r": 7, "k": 1, "alpha": 3}),
    "smora all ranks": (make.write_smora, {"r": 9, "k": 9}),
    "smora groups of 3": (make.write_smora, {"r": 15, "k": 6, "partition": 3}),
    "smora cut groups": (make.write_smora, {"r": 20, "k": 7, "partition": 5}),
    "smora one group": (make.write_smora, {"r": 6, "k": 4, "partition": 6}),
    "smora ignores rsLoRA": (make.write_smora, {"use_rslora": True}),
    "flylora": (make.write_flylora, {}),
    "flylora abs": (make.write_flylora, {"select": "abs", "r": 13, "k": 5}),
    "flylora rsLoRA": (make.write_flylora, {"use_rslora": True, "r": 7, "k": 7}),
    "flylora patterns": (
        make.write_flylora,
        {"rank_pattern": {"up_proj": 5}, "alpha_pattern": {"q_proj": 3.5}, "k": 1,
         "use_rslora": True},
    ),
    "moram": (make.write_moram, {}),
    "moram k below 2": (make.write_moram, {"k": 1, "bank": 7, "r": 3, "delta": 0.5}),
    "moram k above all": (make.write_moram, {"k": 40, "delta": 0}),
    "moram bank only": (make.write_moram, {"fresh": False, "bank": 11}),
    "moram first task": (make.write_moram, {"bank": 0, "r": 6, "k": 3}),
    "moram stored k": (make.write_moram, {"moram_topk": 6, "tau": 0.03}),
    "mola": (make.write_mola, {}),
    "mola one k": (make.write_mola, {"k": 2, "experts": (7, 2, 3), "r": (3, 5, 3)}),
    "loramoe": (make.write_loramoe, {}),
    "loramoe one expert": (make.write_loramoe, {"experts": 1}),
    "hydralora": (make.write_hydralora, {}),
    "hydralora 7 of 1": (make.write_hydralora, {"experts": 7, "r": 1, "alpha": 3}),
    "hydralora one": (make.write_hydralora, {"experts": 1, "r": 5}),
    "adamole": (make.write_adamole, {}),
    "adamole wide": (make.write_adamole, {"max_threshold": 0.6, "experts": 3, "r": 5}),
    "adamole zero": (make.write_adamole, {"max_threshold": 0, "copies": False}),
    "adamole one": (make.write_adamole, {"experts": 1}),
    "mole": (make.write_mole, {"k": 3, "experts": 7, "r": 1}),
    "mole all": (make.write_mole, {"k": 5}),
    "mole threshold": (make.write_mole, {"k": None, "threshold": 0.3}),
    "mola of MoE-PEFT": (make.write_mola_moepeft, {}),
    "mola of MoE-PEFT, rsLoRA": (
        make.write_mola_moepeft, {"use_rslora": True, "experts": 3, "k": 1, "r": 5},
    ),
    "loramoe of MoE-PEFT": (make.write_loramoe_moepeft, {}),
    "loramoe of MoE-PEFT, rsLoRA": (
        make.write_loramoe_moepeft, {"use_rslora": True, "experts": 7, "r": 2},
    ),
}  # fmt: skip


def worst(folder, adapter):
    """Largest difference over all layers, in units of the layer's largest output."""
    files, rng, found = Folder(folder), np.random.default_rng(1), []
    for name, module in adapter.modules.items():
        layer, x_TK = Layer(files, name), normal(rng, TOKENS, module.a_RK.shape[1])
        want_TN = torch.stack([delta(layer, x) for x in x_TK])
        difference = (delta_reference(module, x_TK).double() - want_TN).abs().max()
        found.append(float(difference / max(1e-3, float(want_TN.abs().max()))))
    return max(found)


@pytest.mark.parametrize("base", ["base_llama", "base_qwen2"])
@pytest.mark.parametrize("case", CASES)
def test_formula(case, base, bases, tmp_path):
    write, shape = CASES[case]
    folder = write(tmp_path / "adapter", 7, base, **shape)
    adapter = load_adapter(folder)
    shapes = model_shapes(bases[base])
    check_fits(adapter, shapes, torch.float32, base_name=base)
    targets = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    assert set(adapter.modules) == set(make.linears(base, targets))
    error = worst(folder, adapter)
    print(f"{case}, {base}: largest relative error {error:.1e}")
    assert error < 2e-5
    copy = load_adapter(write_native(adapter, tmp_path / "native"))
    assert worst(folder, copy) == error


@pytest.mark.parametrize("system", make.WRITERS)
def test_the_reader_has_the_writers_name(system, tmp_path):
    assert load_adapter(make.WRITERS[system](tmp_path / "a", 3)).system == system


def test_a_threshold_that_nobody_reaches_leaves_the_base_model(tmp_path):
    adapter = load_adapter(make.write_mole(tmp_path / "a", 3, k=None, threshold=1.5))
    for module in adapter.modules.values():
        x_TK = normal(np.random.default_rng(0), 4, module.a_RK.shape[1])
        assert not delta_reference(module, x_TK).any()
