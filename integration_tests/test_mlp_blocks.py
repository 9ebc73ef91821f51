"""MixLoRA's blocks in other model classes of the Llama layout, against transformers in fp32."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, MistralConfig, Phi3Config, Qwen3Config

from integration_tests.engines import close, lora, make_engine, prompt_logprobs, worst
from vllm_lora_ext.adapters.hf import apply_adapter
from vllm_lora_ext.adapters.model import LowRank, MixBlock, RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.readers.native import write_native
from vllm_lora_ext.routing import GateSpec

BOUND = 1e-4
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 300, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 32,
}  # fmt: skip
# The activation of Gemma is no silu; Phi-3 fuses gate and up.
FAMILIES = {
    "gemma2": Gemma2Config(**SIZES, query_pre_attn_scalar=32, sliding_window=128),
    "phi3": Phi3Config(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen3": Qwen3Config(**SIZES),
}
TOP2 = {"select": "top_k", "k": 2, "weight": "renormalise"}
NUCLEUS = {"select": "top_p", "top_p": 0.6}

pytestmark = pytest.mark.engine


def random_experts(family: str, gate: dict[str, object], seed: int) -> RoutedAdapter:
    """Experts on the whole MLP, and a plain LoRA on o_proj."""
    g = torch.Generator().manual_seed(seed)

    def pair(k: int, n: int, rank: int) -> LowRank:
        return LowRank(torch.randn(rank, k, generator=g) / 4, torch.randn(n, rank, generator=g) / 4)

    blocks, modules = {}, {}
    for layer in range(2):
        ranks = (3, 5, 2)
        up = {"gate_up_proj": (64, 192)} if family == "phi3" else {
            "gate_proj": (64, 96), "up_proj": (64, 96)
        }  # fmt: skip
        parts = {name: pair(*size, sum(ranks)) for name, size in up.items()}
        parts["down_proj"] = pair(96, 64, sum(ranks))
        spec = GateSpec(source="router", blocks=ranks, score="softmax", **gate)
        blocks[f"model.layers.{layer}.mlp"] = MixBlock(spec, torch.randn(3, 64, generator=g), parts)
        plain = pair(64, 64, 4)
        modules[f"model.layers.{layer}.self_attn.o_proj"] = RoutedModule(plain.a_RK, plain.b_NR)
    return RoutedAdapter(modules, "mixlora", blocks=blocks)


@pytest.mark.parametrize("family", ["gemma2", "phi3"])
def test_blocks_of_another_family(family, tmp_path):
    torch.manual_seed(0)
    config = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2)
    model.save_pretrained(tmp_path / "base")
    adapters = [random_experts(family, gate, i) for i, gate in enumerate((TOP2, NUCLEUS))]
    prompts = [torch.randint(3, 300, (n,)).tolist() for n in (7, 40)]
    requests, wanted = [], []
    for i, adapter in enumerate(adapters):
        request = lora(f"{family}-{i}", write_native(adapter, tmp_path / f"adapter-{i}"))
        for prompt in prompts:
            with torch.no_grad():
                base = model(torch.tensor([prompt])).logits[0]
                with apply_adapter(model, adapter):
                    mixed = model(torch.tensor([prompt])).logits[0]
            assert (mixed - base).abs().max() > 0.05
            requests += [(prompt, request), (prompt, None)]
            wanted += [mixed, base]
    llm = make_engine(tmp_path / "base", enforce_eager=True)
    try:
        got = prompt_logprobs(llm, requests, 300)
    finally:
        close(llm)
    diffs = [worst(g, w) for g, w in zip(got, wanted, strict=True)]
    print(f"{family}: max |dlogp| {max(diffs[::2]):.1e}, base rows {max(diffs[1::2]):.1e}")
    assert max(diffs) < BOUND
