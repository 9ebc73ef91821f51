"""Stand-ins for what vLLM's tests take from the hub: the same names, files and settings, tiny.

Written as the hub's own cache, so that the tests, transformers and vLLM find them by name, offline.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

REVISION = "0" * 40
HIDDEN = 32
LINEARS = {
    "self_attn.q_proj": (HIDDEN, 64), "self_attn.k_proj": (HIDDEN, 32),
    "self_attn.v_proj": (HIDDEN, 32), "self_attn.o_proj": (64, HIDDEN),
    "mlp.gate_proj": (HIDDEN, 48), "mlp.up_proj": (HIDDEN, 48), "mlp.down_proj": (48, HIDDEN),
}  # fmt: skip
Shapes = Mapping[str, tuple[int, int]]


def write(home: Path) -> None:
    """Fills `home`, a value for HF_HOME; what is there already stays."""
    for repo, fill in REPOS.items():
        root = home / "hub" / f"models--{repo.replace('/', '--')}"
        folder = root / "snapshots" / REVISION
        if not (root / "refs" / "main").exists():
            folder.mkdir(parents=True, exist_ok=True)
            fill(folder)
            (root / "refs").mkdir(exist_ok=True)
            (root / "refs" / "main").write_text(REVISION)


def _qwen3(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=512, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=512,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"?": 0, "<end>": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token="<end>")
    fast.save_pretrained(folder)


def _adapter(shapes: Shapes, rank: int, alpha: int, **config: Any) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        draw, tensors = torch.Generator().manual_seed(0), {}
        for name, (k, n) in shapes.items():
            kind = "embedding_" if name.endswith("embed_tokens") else ""
            stem, end = f"base_model.model.{name}.lora_{kind}", "" if kind else ".weight"
            tensors[f"{stem}A{end}"] = torch.randn(rank, k, generator=draw) / 8
            tensors[f"{stem}B{end}"] = torch.randn(n, rank, generator=draw) / 8
        save_file(tensors, folder / "adapter_model.safetensors")
        settings = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha,
            "bias": "none", "target_modules": sorted({n.rpartition(".")[2] for n in shapes}),
        }  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(settings | config))

    return fill


def _layers(parts: Shapes, layers: int = 2, prefix: str = "model.layers") -> Shapes:
    return {f"{prefix}.{i}.{name}": shape for i in range(layers) for name, shape in parts.items()}


def _experts(layers: int, experts: int) -> Shapes:
    shapes = {f"self_attn.{n}_proj": (2, 2) for n in "qkvo"} | {"mlp.gate": (2, 2)}
    for expert in range(experts):
        shapes |= {f"mlp.experts.{expert}.{n}_proj": (2, 2) for n in ("gate", "up", "down")}
    return _layers(shapes, layers)


_BAICHUAN = _layers(
    {"self_attn.W_pack": (HIDDEN, 96), "self_attn.o_proj": (HIDDEN, HIDDEN)}
    | {name: shape for name, shape in LINEARS.items() if name.startswith("mlp")}
)
_CHATGLM = _layers(
    {"self_attention.query_key_value": (HIDDEN, 96)}, prefix="transformer.encoder.layers"
)
_ENDS = {"model.embed_tokens": (512, HIDDEN), "lm_head": (HIDDEN, 512)}
REPOS: dict[str, Callable[[Path], None]] = {
    "Qwen/Qwen3-0.6B": _qwen3,
    "charent/self_cognition_Alice": _adapter(_layers(LINEARS), 8, 32),
    "jeeejeee/llama32-3b-text2sql-spider": _adapter({**_layers(LINEARS), **_ENDS}, 8, 32),
    "jeeejeee/baichuan7b-text2sql-spider": _adapter(_BAICHUAN, 8, 32),
    "jeeejeee/baichuan7b-zero-init": _adapter(
        _BAICHUAN, 8, 32, target_modules=[f"model.layers.{i}.self_attn.W_pack" for i in (0, 1)]
    ),
    "jeeejeee/baichuan-7b-lora-zero-regex": _adapter(
        _BAICHUAN, 8, 32, target_modules=r"model\..*(W_pack|o_proj)"
    ),
    "jeeejeee/chatglm3-text2sql-spider": _adapter(_CHATGLM, 8, 32),
    "jeeejeee/qwen3-moe-text2sql-spider": _adapter(_experts(48, 128), 1, 2),
}
