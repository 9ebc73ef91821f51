"""The numbers by which kernels know the steps of a gate: each step's place among its choices in
`routing.spec`. A new choice goes to the end of its list there, and nowhere else."""

from __future__ import annotations

from typing import get_args

from vllm_lora_ext.routing.spec import Bias, Score, Select, Weight

SCORES: tuple[str, ...] = get_args(Score)
SELECTS: tuple[str, ...] = get_args(Select)
WEIGHTS: tuple[str, ...] = get_args(Weight)
BIASES: tuple[str, ...] = get_args(Bias)
MOST_ACTIVATED = 256  # ranks of gate and of up, whose gates must be in registers at once
# Elementwise, by transformers' names.
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "quick_gelu", "relu")


def header() -> str:
    """The same numbers for C++: `kScoreSoftmax`, `kSelectTopK`, `kWeightOne`, ..."""
    kinds = {"Score": SCORES, "Select": SELECTS, "Weight": WEIGHTS}
    lines = ["// Written by codes.py.", "#pragma once", "#include <cstdint>", ""]
    for kind, names in kinds.items():
        each = ", ".join(f"k{kind}{name.title().replace('_', '')}" for name in names)
        lines.append(f"enum {kind} : std::int64_t {{ {each} }};")
    return "\n".join(lines) + "\n"
