"""DoRA folders that PEFT saved, with random weights, and PEFT's model of them."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make(folder: Path, base: torch.nn.Module, seed: int = 0, **lora: Any) -> torch.nn.Module:
    """Saves a DoRA of `base`, which stays as it is; PEFT's model of what was saved.

    Magnitudes are those of the base times a factor between a half and one and a half.
    """
    options: dict[str, Any] = {
        "r": 4, "lora_alpha": 6, "target_modules": LINEARS, "use_dora": True,
        "task_type": "CAUSAL_LM",
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(**options | lora)
        model = get_peft_model(copy.deepcopy(base), config).eval()
        generator = torch.Generator().manual_seed(seed)
        for name, weight in model.named_parameters():
            if "lora_magnitude_vector" in name:
                weight.data *= 0.5 + torch.rand(weight.shape, generator=generator)
            elif "lora_" in name:
                weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
        model.save_pretrained(folder)
        return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
