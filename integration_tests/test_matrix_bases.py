"""Kinds of adapters × base models that are not plain decoders of full precision; `make matrix`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    GraniteMoeHybridConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from integration_tests import matrix, other_bases, quantised, whisper
from integration_tests.engines import base_path, close, lora, make_engine, recorded
from integration_tests.followed import INSTRUCTION, USERS, write_made
from integration_tests.matrix import Record
from integration_tests.other_bases import Kind
from integration_tests.reference_model import model
from integration_tests.server import (
    Server,
    base_with_tokenizer,
    command,
    free_port,
    serving,
)
from tests.bad_adapters import poison, with_tensors
from tests.make_adapters import TARGETS
from vllm_lora_ext.errors import AdapterError

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900), matrix.whole]

TWO_PASS = {"lora_ext": {"two_pass": True}}
STEADY = "float32, activations of 8 bits: prompts on which no value is near a tie"
# What it is, in which precision it is run, and what is right then.
QUANTISED: dict[str, tuple[str, str, float]] = {
    "awq": ("AWQ base, 4 bits", "float16", 0.1),
    "gptq": ("GPTQ base, 4 bits", "float16", 0.1),
    "w4a16": ("compressed-tensors base, W4A16", "float16", 0.1),
    "w8a8": ("compressed-tensors base, W8A8", "float32", matrix.BOUND),
    "fp8": ("compressed-tensors base, FP8", "float32", matrix.BOUND),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_base(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Written tensor by tensor, and run by transformers with the weights that it stands for."""
    title, dtype, bound = QUANTISED[name]
    record, folder = Record(title, request.node.nodeid, bound), tmp_path / "adapters"
    net = AutoModelForCausalLM.from_pretrained(base_path(matrix.BASE), dtype=torch.float32).eval()
    steady = dtype == "float32"
    if not steady:
        net = net.half().float()
    quantised.write(name, base_path(matrix.BASE), tmp_path / "base", net)
    found = other_bases.kinds(net, TARGETS, folder, name)
    mix = other_bases.mix_block(net, "model.layers.1.mlp", folder, name)
    if steady:
        mix = replace(mix, wears=[quantised.mixed_once(*mix.wears)])
    found["MixLoRA block"] = mix
    found |= other_bases.completed(net, tmp_path / "made", name)
    found["DoRA"] = other_bases.dora(model(matrix.BASE), TARGETS, folder, name)
    found["X-LoRA"] = other_bases.xlora(net, TARGETS, folder, name)
    llm = make_engine(
        tmp_path / "base", dtype=dtype, enforce_eager=True, additional_config=TWO_PASS
    )
    try:
        refused = other_bases.refusals(llm, found)
        assert refused == {"DoRA": "unsupported_feature"}
        note = STEADY if steady else f"{dtype}, {bound} allowed"
        ask(llm, net, found, refused, record, folder, note, steady)
    finally:
        close(llm)
    record.close()


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SHAPE: dict[str, Any] = {  # as base_llama's
    "vocab_size": matrix.VOCABULARY, "hidden_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
    "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
REFUSED = "unsupported_feature"


@dataclass(frozen=True)
class Base:
    """
    Args:
        title: of the column; targets: last parts of the adapted layers' names.
        mlp: a block for MixLoRA.
        every: whether all layers have base_llama's attention, not only the first.
        two_pass: whether it can run twice in a step, for X-LoRA.
        refuses: row → code.
        dtype, bound: in which precision the engine runs, and what is right then.
    """

    title: str
    config: Any
    targets: tuple[str, ...]
    mlp: str
    every: bool = True
    two_pass: bool = False
    refuses: dict[str, str] = field(default_factory=dict)
    dtype: str = "float32"
    bound: float = matrix.BOUND


BASES = {
    "qwen3-moe": Base(
        "Mixture-of-experts base, every kind",
        Qwen3MoeConfig(
            **SHAPE, intermediate_size=96, moe_intermediate_size=48, num_hidden_layers=3,
            num_experts=4, num_experts_per_tok=2, norm_topk_prob=True, mlp_only_layers=[1],
        ),
        ATTENTION, "model.layers.1.mlp", two_pass=True,
        # Its dense MLPs have room for an expert's gate.
        refuses={"MixLoRA block": REFUSED},
    ),
    "falcon-h1": Base(
        "Hybrid base, Mamba 2 beside attention (Falcon-H1)",
        FalconH1Config(
            **SHAPE, intermediate_size=192, num_hidden_layers=3, mamba_d_ssm=128, mamba_n_heads=4,
            mamba_d_head=32, mamba_n_groups=1, mamba_d_state=32, mamba_d_conv=4,
            mamba_chunk_size=32, mlp_multipliers=[0.8, 1.2],
        ),
        (*ATTENTION, "gate_proj", "up_proj", "down_proj"), "model.layers.1.feed_forward",
        # Its MLPs multiply in between, and its last norm has another name.
        refuses={"MixLoRA block": REFUSED, "instruction": REFUSED},
    ),
    "granite": Base(
        "Hybrid base, Mamba 2 and experts (Granite 4)",
        GraniteMoeHybridConfig(
            **{k: v for k, v in SHAPE.items() if k != "head_dim"}, intermediate_size=64,
            shared_intermediate_size=96, num_hidden_layers=3, num_local_experts=4,
            num_experts_per_tok=2, layer_types=["attention", "mamba", "mamba"], mamba_n_heads=8,
            mamba_d_head=32, mamba_n_groups=1, mamba_d_state=32, mamba_chunk_size=32,
            mamba_expand=2, position_embedding_type="rope",
        ),
        (*ATTENTION, "out_proj"), "model.layers.0.shared_mlp", every=False,
        refuses={"MixLoRA block": "unknown_module"},
    ),
    "qwen3-next": Base(
        "Hybrid base, gated delta net (Qwen3-Next)",
        Qwen3NextConfig(
            **SHAPE, intermediate_size=96, num_hidden_layers=4,
            layer_types=["full_attention", "linear_attention"] * 2,
            linear_num_value_heads=2, linear_num_key_heads=1, linear_key_head_dim=128,
            linear_value_head_dim=128, linear_conv_kernel_dim=4, moe_intermediate_size=48,
            shared_expert_intermediate_size=48, num_experts=4, num_experts_per_tok=4,
            mlp_only_layers=[2],
        ),
        (*ATTENTION, "out_proj"), "model.layers.2.mlp", every=False,
        # vLLM has this attention for a CPU in this precision only; all experts, since a router
        # would choose others where two nearly tie.
        refuses={"MixLoRA block": REFUSED}, dtype="bfloat16", bound=0.1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BASES)
def test_another_base(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights, run by transformers and PEFT too."""
    base = BASES[name]
    record, folder = Record(base.title, request.node.nodeid, base.bound), tmp_path / "adapters"
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(base.config, attn_implementation="eager")
    net = net.float().eval()
    with torch.no_grad():
        for weights in net.parameters():
            weights.add_(0.02 * torch.randn_like(weights))
            weights.copy_(weights.to(getattr(torch, base.dtype)))
    net.save_pretrained(tmp_path / "base")
    found = other_bases.kinds(net, base.targets, folder, name)
    found["DoRA"] = other_bases.dora(net, base.targets, folder, name)
    found["MixLoRA block"] = other_bases.mix_block(net, base.mlp, folder, name)
    user = USERS[0] if base.every else USERS[1]
    found |= other_bases.completed(net, tmp_path / "made", name, base.every, user)
    options: dict[str, Any] = {"enforce_eager": True, "dtype": base.dtype}
    if base.two_pass:
        found["X-LoRA"] = other_bases.xlora(net, base.targets, folder, name)
        options["additional_config"] = TWO_PASS
    llm = make_engine(tmp_path / "base", **options)
    try:
        refused = other_bases.refusals(llm, found)
        assert refused == base.refuses
        note = f"{base.dtype}, {base.bound} allowed" if base.dtype != "float32" else ""
        ask(llm, net, found, refused, record, folder, note)
    finally:
        close(llm)
    if not base.two_pass:
        record.other(
            "refused", two_pass_refusal(tmp_path / "base", monkeypatch, dtype=base.dtype), "X-LoRA"
        )
    record.close()


def two_pass_refusal(base: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> str:
    """The code with which an engine that is to run its model twice in a step does not start."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # its error comes to here
    with pytest.raises(AdapterError) as caught:
        close(make_engine(base, enforce_eager=True, additional_config=TWO_PASS, **options))
    return caught.value.code


def ask(
    llm: Any, net: Any, found: dict[str, Kind], refused: dict[str, str], record: Record,
    folder: Path, note: str = "", steady: bool = False,
) -> None:  # fmt: skip
    """Of those that are not refused, in one batch."""
    other_bases.load(llm, folder, found["plain"].request.lora_name.removesuffix("-one"))
    served = {row: kind for row, kind in found.items() if row not in refused}
    numbers = other_bases.errors(llm, net, served, matrix.VOCABULARY, steady)
    record.right(numbers, note)
    for row, code in refused.items():
        record.other("refused", code, row)


def test_whisper(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder's layers that read its own states. vLLM has no prefix cache for such models."""
    record, folder = (
        Record("Encoder-decoder (Whisper)", request.node.nodeid), tmp_path / "adapters",
    )  # fmt: skip
    net = whisper.write(tmp_path / "base")
    found = other_bases.kinds(net, whisper.TARGETS, folder, "sound", under=whisper.DECODER)
    found["DoRA"] = other_bases.dora(net, whisper.LAYERS, folder, "sound")
    # Its MLPs are no blocks of their own in transformers; users' and instructions' files name
    # the layers of a Llama.
    found["MixLoRA block"] = other_bases.mix_block(net, "model.decoder.layers.1", folder, "sound")
    write_made(tmp_path / "made")
    for row, made in (("user", USERS[0]), ("instruction", INSTRUCTION)):
        found[row] = Kind((), lora(f"sound-{row}", tmp_path / "made" / made))
    options: dict[str, Any] = {
        "skip_tokenizer_init": False, "max_model_len": 64, "enable_prefix_caching": False,
        "limit_mm_per_prompt": {"audio": 1},
    }  # fmt: skip
    llm = make_engine(tmp_path / "base", enforce_eager=True, **options)
    try:
        refused = other_bases.refusals(llm, found)
        assert refused == whisper.REFUSED
        other_bases.load(llm, folder, "sound")
        served = {row: kind for row, kind in found.items() if row not in refused}
        record.right(whisper.errors(llm, net, served))
        for row, code in refused.items():
            record.other("refused", code, row)
        for i, under in enumerate(whisper.ENCODER_ROWS):
            wrong = other_bases.kinds(net, ("k_proj",), tmp_path / str(i), f"wrong-{i}", under)
            with pytest.raises(AdapterError, match=under) as caught:
                llm.llm_engine.add_lora(wrong["plain"].request)
            assert caught.value.code == REFUSED
    finally:
        close(llm)
    code = two_pass_refusal(tmp_path / "base", monkeypatch, **options)
    record.other("refused", code, "X-LoRA")
    record.close()


def test_overflow_in_half_precision(tmp_path: Path) -> None:
    """A server in float16 refuses |B| = 3e6, and goes on answering."""
    fx, large = recorded("plain-a"), tmp_path / "large"
    with_tensors(poison("up_proj.lora_B", -3e6))(large, fx.folder)
    server = command(
        base_with_tokenizer(tmp_path / matrix.BASE), free_port(), None,
        "--dtype", "float16", "--enforce-eager", "--lora-modules", f"plain-a={fx.folder}",
    )  # fmt: skip
    case = matrix.of_fixture("plain-a").cases[0]

    def answered(running: Server) -> Any:
        choice = matrix.posted(running, case)
        assert matrix.http_error(case, choice) < 0.02  # float16's own
        return choice["token_ids"], choice["logprobs"]["token_logprobs"]

    loading = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with serving(server, tmp_path / "server.log", **loading) as running:
        before = answered(running)
        body = {"lora_name": "large", "lora_path": str(large)}
        answer = httpx.post(f"{running.url}/v1/load_lora_adapter", json=body, trust_env=False)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["type"] == "overflow"
        assert "up_proj" in error["message"] and "float16" in error["message"]
        models = httpx.get(f"{running.url}/v1/models", trust_env=False).json()["data"]
        assert [model["id"] for model in models] == ["base", "plain-a"]
        assert answered(running) == before
