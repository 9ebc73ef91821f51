"""Kinds of adapters × base models that are not plain decoders of full precision; `make matrix`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    GraniteMoeHybridConfig,
    JambaConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from integration_tests import matrix, other_bases, quantised, whisper
from integration_tests.engines import base_path, close, make_engine, recorded
from integration_tests.matrix import Record
from integration_tests.other_bases import Kind
from integration_tests.reference_model import model
from integration_tests.server import (
    Server,
    add_tokenizer,
    base_with_tokenizer,
    command,
    free_port,
    serving,
    words,
)
from tests.bad_adapters import poison, with_tensors
from tests.make_adapters import TARGETS
from vllm_lora_ext.errors import AdapterError

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900), matrix.whole]

# A value that lies between two of int8 goes either way, and everything after it with it.
EITHER_WAY = "activations of 8 bits: a value between two of them goes either way"
QUANTISED: dict[str, tuple[str, str, float]] = {  # what it is, and in which precision it is run
    "awq": ("AWQ base, 4 bits", "float16", 0.1),
    "gptq": ("GPTQ base, 4 bits", "float16", 0.1),
    "w4a16": ("compressed-tensors base, W4A16", "float16", 0.1),
    "w8a8": ("compressed-tensors base, W8A8", "float32", 0.3),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_base(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Written tensor by tensor, and run by transformers with the weights that it stands for."""
    title, dtype, bound = QUANTISED[name]
    record, folder = Record(title, request.node.nodeid, bound), tmp_path / "adapters"
    net = AutoModelForCausalLM.from_pretrained(base_path(matrix.BASE), dtype=torch.float32).eval()
    if dtype == "float16":
        net = net.half().float()
    quantised.write(name, base_path(matrix.BASE), tmp_path / "base", net)
    found = other_bases.kinds(net, TARGETS, folder, name)
    found["MixLoRA block"] = other_bases.mix_block(net, "model.layers.1.mlp", folder, name)
    found |= other_bases.completed(net, tmp_path / "made", name)
    found["DoRA"] = other_bases.dora(model(matrix.BASE), TARGETS, folder, name)
    llm = make_engine(tmp_path / "base", dtype=dtype, enforce_eager=True)
    try:
        refused = other_bases.refusals(llm, found)
        assert refused == {"DoRA": "unsupported_feature"}
        more = f", {EITHER_WAY}" if name == "w8a8" else ""
        ask(llm, net, found, refused, record, folder, f"{dtype}{more}, {bound} allowed")
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
        mlp: a block for MixLoRA; "": it has none.
        completed: whether each layer has the attention of base_llama.
        refuses: row → code.
    """

    title: str
    config: Any
    targets: tuple[str, ...]
    mlp: str = ""
    completed: bool = True
    refuses: dict[str, str] = field(default_factory=dict)


BASES = {
    "qwen3-moe": Base(
        "Mixture-of-experts base, every kind",
        Qwen3MoeConfig(
            **SHAPE, intermediate_size=96, moe_intermediate_size=48, num_hidden_layers=3,
            num_experts=4, num_experts_per_tok=2, norm_topk_prob=True,
        ),
        ATTENTION,
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
            num_experts_per_tok=2, layer_types=["mamba", "attention", "mamba"], mamba_n_heads=8,
            mamba_d_head=32, mamba_n_groups=1, mamba_d_state=32, mamba_chunk_size=32,
            mamba_expand=2, position_embedding_type="rope",
        ),
        (*ATTENTION, "out_proj"), completed=False,
    ),
    "jamba": Base(
        "Hybrid base, Mamba 1 and experts (Jamba)",
        JambaConfig(
            **{k: v for k, v in SHAPE.items() if k != "head_dim"}, intermediate_size=96,
            num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
            expert_layer_offset=1, num_experts=4, num_experts_per_tok=2, mamba_d_state=16,
            mamba_d_conv=4, mamba_expand=2, mamba_dt_rank=8, use_mamba_kernels=False,
        ),
        (*ATTENTION, "out_proj"), completed=False,
    ),
    "qwen3-next": Base(
        "Hybrid base, gated delta net (Qwen3-Next)",
        Qwen3NextConfig(
            **SHAPE, intermediate_size=96, num_hidden_layers=4, full_attention_interval=2,
            linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=32,
            linear_value_head_dim=32, linear_conv_kernel_dim=4, moe_intermediate_size=48,
            shared_expert_intermediate_size=48, num_experts=4, num_experts_per_tok=2,
        ),
        (*ATTENTION, "out_proj"), completed=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BASES)
def test_another_base(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Random weights, run by transformers and PEFT too."""
    base = BASES[name]
    record, folder = Record(base.title, request.node.nodeid), tmp_path / "adapters"
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(base.config, attn_implementation="eager")
    net = net.float().eval()
    with torch.no_grad():
        for weights in net.parameters():
            weights.add_(0.02 * torch.randn_like(weights))
    net.save_pretrained(tmp_path / "base")
    found = other_bases.kinds(net, base.targets, folder, name)
    found["DoRA"] = other_bases.dora(net, base.targets, folder, name)
    if base.mlp:
        found["MixLoRA block"] = other_bases.mix_block(net, base.mlp, folder, name)
    if base.completed:
        found |= other_bases.completed(net, tmp_path / "made", name)
    llm = make_engine(tmp_path / "base", enforce_eager=True)
    try:
        refused = other_bases.refusals(llm, found)
        assert refused == base.refuses
        ask(llm, net, found, refused, record, folder)
    finally:
        close(llm)
    record.close()


def ask(
    llm: Any, net: Any, found: dict[str, Kind], refused: dict[str, str], record: Record,
    folder: Path, note: str = "",
) -> None:  # fmt: skip
    """Of those that are not refused, in one batch."""
    other_bases.load(llm, folder, found["plain"].request.lora_name.removesuffix("-one"))
    served = {row: kind for row, kind in found.items() if row not in refused}
    numbers = other_bases.errors(llm, net, served, matrix.VOCABULARY)
    record.right(numbers, note)
    for row, code in refused.items():
        record.other("refused", code, row)


def test_whisper(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The decoder's layers that read its own states. vLLM has no prefix cache for such models."""
    record, folder = (
        Record("Encoder-decoder (Whisper)", request.node.nodeid), tmp_path / "adapters",
    )  # fmt: skip
    net = whisper.write(tmp_path / "base")
    found = other_bases.kinds(net, whisper.TARGETS, folder, "sound", under=whisper.DECODER)
    llm = make_engine(
        tmp_path / "base", enforce_eager=True, skip_tokenizer_init=False, max_model_len=64,
        enable_prefix_caching=False,
        limit_mm_per_prompt={"audio": 1},
    )  # fmt: skip
    try:
        other_bases.load(llm, folder, "sound")
        record.right(whisper.errors(llm, net, found))
        for i, under in enumerate(whisper.ENCODER_ROWS):
            wrong = other_bases.kinds(net, ("k_proj",), tmp_path / str(i), f"wrong-{i}", under)
            with pytest.raises(AdapterError, match=under) as caught:
                llm.llm_engine.add_lora(wrong["plain"].request)
            assert caught.value.code == REFUSED
    finally:
        close(llm)
    record.close()


CLASSIFY = ("base", "plain", "merged", "routed linear", "rank-wise", "several, scaled", "spans")


def test_classify(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """A pooling server's /classify, its field `lora_ext` included."""
    record, folder = Record("Classification, over HTTP", request.node.nodeid), tmp_path / "adapters"
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, intermediate_size=192, num_hidden_layers=2, num_labels=3)
    net = LlamaForSequenceClassification(config).float().eval()
    with torch.no_grad():
        for weights in net.parameters():
            weights.add_(0.05 * torch.randn_like(weights))
    net.save_pretrained(tmp_path / "base")
    add_tokenizer(tmp_path / "base", matrix.VOCABULARY)
    kinds = other_bases.kinds(net, TARGETS, folder, "cls")
    loaded = [f"cls-{path.name}={path}" for path in folder.iterdir()]
    server = command(
        tmp_path / "base", free_port(), None, "--runner", "pooling", "--enforce-eager",
        "--max-loras", "4", "--max-cpu-loras", "8", "--lora-modules", *loaded,
    )  # fmt: skip
    asked = [(row, ids) for row in CLASSIFY for ids in other_bases.prompts(matrix.VOCABULARY)]
    with serving(server, tmp_path / "server.log") as running, ThreadPoolExecutor(8) as pool:
        for _ in range(2):
            got = list(pool.map(lambda a: classified(running, kinds[a[0]], a[1]), asked))
            for (row, ids), probabilities in zip(asked, got, strict=True):
                want = other_bases.expected(net, kinds[row].wears, ids).softmax(-1)
                plain = other_bases.expected(net, (), ids).softmax(-1)
                assert row == "base" or (want - plain).abs().max() > 0.02, row
                record.right({row: (torch.tensor(probabilities) - want).abs().max().item()})
    record.close()


def classified(server: Server, kind: Kind, ids: list[int]) -> list[float]:
    """Its labels' probabilities."""
    body = {"model": kind.request.lora_name if kind.request else "base", "input": words(ids)}
    said = {"lora_ext": kind.says} if kind.says else {}
    answer = httpx.post(f"{server.url}/classify", json=body | said, timeout=120, trust_env=False)
    assert answer.status_code == 200, answer.text
    found: list[float] = answer.json()["data"][0]["probs"]
    return found


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
