"""A mixture-of-experts base model, LoRA on attention and router, against transformers and PEFT."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from integration_tests.engines import close, lora, make_engine, prompt_logprobs, worst
from tests.make_adapters import router_spec
from vllm_lora_ext.adapters.hf import apply_adapter
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.readers.native import write_native
from vllm_lora_ext.errors import AdapterError

BOUND, VOCABULARY = 1e-4, 300
PROMPTS = ([5, 17, 33, 101, 7, 200, 3], [9, 8, 7, 6, 150, 299, 44, 45, 46], [12, 13, 280])
CONFIG = Qwen3MoeConfig(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, moe_intermediate_size=48,
    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_experts=4,
    num_experts_per_tok=2, norm_topk_prob=True, max_position_embeddings=256,
    tie_word_embeddings=False,
)  # fmt: skip

pytestmark = pytest.mark.engine


def routed(targets: dict[str, tuple[int, int]]) -> RoutedAdapter:
    g = torch.Generator().manual_seed(1)
    spec = router_spec()
    rank = sum(spec.blocks)
    modules = {}
    for name, (k, n) in targets.items():
        a, b = torch.randn(rank, k, generator=g) / 8, torch.randn(n, rank, generator=g) / 8
        modules[name] = RoutedModule(a, b, spec, torch.randn(spec.num_gates, k, generator=g))
    return RoutedAdapter(modules, "random")


def test_base_plain_and_routed_rows(tmp_path):
    """In one batch, LoRA on attention and on the router; the experts' own weights take none on a
    CPU, and an adapter that has some is refused while the others go on."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG, attn_implementation="eager").float().eval()
    model.save_pretrained(tmp_path / "base")
    heads = {"q_proj": (64, 64), "o_proj": (64, 64)}
    adapter = routed(
        {f"model.layers.{i}.self_attn.{n}": s for i in (0, 1) for n, s in heads.items()}
    )
    write_native(adapter, tmp_path / "routed")
    expert = RoutedModule(torch.ones(2, 64), torch.ones(48, 2))
    inside = {"model.layers.0.mlp.experts.0.gate_proj": expert}
    write_native(RoutedAdapter(inside, "plain"), tmp_path / "experts")

    def logits(net, prompt):
        with torch.inference_mode():
            return net(input_ids=torch.tensor([prompt])).logits[0]

    wanted = [logits(model, PROMPTS[0])]
    with apply_adapter(model, adapter):
        wanted.append(logits(model, PROMPTS[1]))
    for name, parameters in (("plain", ["gate.weight"]), ("all", ["experts.down_proj"])):
        config = LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], target_parameters=parameters,
            init_lora_weights=False,
        )  # fmt: skip
        peft = get_peft_model(model, config).eval()
        peft.save_pretrained(tmp_path / name)
        if name == "plain":
            wanted.append(logits(peft, PROMPTS[2]))
        peft.unload()

    llm = make_engine(tmp_path / "base", enforce_eager=True)
    try:
        plain, mixed = (
            lora("moe-plain", tmp_path / "plain"),
            lora("moe-routed", tmp_path / "routed"),
        )
        requests = list(zip(PROMPTS, (None, mixed, plain), strict=True))
        for _ in range(2):
            got = prompt_logprobs(llm, requests, VOCABULARY)
            diffs = [worst(g, w) for g, w in zip(got, wanted, strict=True)]
            print("MoE base: max |dlogp| base, routed, plain", *(f"{d:.1e}" for d in diffs))
            assert max(diffs) < BOUND
            for name in ("experts", "all"):
                with pytest.raises(AdapterError, match="on a GPU only") as caught:
                    llm.llm_engine.add_lora(lora(f"moe-{name}", tmp_path / name))
                assert caught.value.code == "unsupported_feature"
    finally:
        close(llm)
