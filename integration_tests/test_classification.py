"""Adapters of classification and reward models: trained heads and LoRA on them, as PEFT has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from integration_tests.engines import close, lora, make_engine
from tests.make_adapters import random_adapter
from vllm_lora_ext.adapters.hf import apply_adapter
from vllm_lora_ext.adapters.readers.native import write_native
from vllm_lora_ext.errors import AdapterError

BOUND, LABELS, MOST = 1e-5, 3, 5
PROMPTS = ([5, 17, 33, 101, 7], [9, 8, 7, 6, 150, 299, 44, 45, 46], [12, 13, 280], [400, 3, 3, 9])
CONFIG: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip

pytestmark = pytest.mark.engine


def base(labels: int = LABELS) -> Any:
    """The same model below the head, whatever the number of labels."""
    torch.manual_seed(0)
    config = Qwen2Config(**CONFIG, num_labels=labels)
    return Qwen2ForSequenceClassification(config).float().eval()


def peft(folder: Path, seed: int, labels: int = LABELS, **config: Any) -> Any:
    """The base under a random PEFT adapter, which is saved in `folder`."""
    torch.manual_seed(seed)
    own = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]} | config
    model = get_peft_model(base(labels), LoraConfig(**own, init_lora_weights=False)).eval()
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "modules_to_save" in name:
                weights.normal_(0, 0.2)
    model.save_pretrained(folder)
    return model


def probabilities(model: Any, prompt: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt])).logits[0].double()
    return logits.softmax(-1) if len(logits) > 1 else logits.sigmoid()


def change(folder: Path, source: Path, tensors: Any = None, **config: Any) -> Path:
    """A copy of an adapter, with other tensors and other values in its config."""
    weights = load_file(source / "adapter_model.safetensors")
    if tensors is not None:
        tensors(weights)
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    own = json.loads((source / "adapter_config.json").read_text()) | config
    (folder / "adapter_config.json").write_text(json.dumps(own))
    return folder


def classify(llm: Any, requests: list[tuple[list[int], Any]]) -> list[torch.Tensor]:
    outputs = llm.classify(
        [{"prompt_token_ids": prompt} for prompt, _ in requests],
        lora_request=[adapter for _, adapter in requests], use_tqdm=False,
    )  # fmt: skip
    return [torch.tensor(o.outputs.probs).double() for o in outputs]


def wrong(source: Path, root: Path) -> dict[str, tuple[Path, str]]:
    """Folders with a defect, and the code of each."""
    score = "base_model.model.score.weight"

    def poison(weights: dict[str, torch.Tensor]) -> None:
        weights[score][1, 2] = float("nan")

    def narrow(weights: dict[str, torch.Tensor]) -> None:
        weights[score] = weights[score][:, 1:].contiguous()

    def repeat(weights: dict[str, torch.Tensor]) -> None:
        weights[score] = weights[score].repeat(2, 1)

    made = {
        "nan": (change(root / "nan", source, poison), "not_finite"),
        "narrow": (change(root / "narrow", source, narrow), "shape_mismatch"),
        "labels": (change(root / "labels", source, repeat), "shape_mismatch"),
        "lost": (change(root / "lost", source, lambda w: w.pop(score)), "missing_tensor"),
        "unsaid": (change(root / "unsaid", source, modules_to_save=None), "unexpected_tensor"),
        "other": (
            change(root / "other", source, modules_to_save=["embed_tokens"]),
            "unsupported_feature",
        ),
    }
    return made


def test_heads_beside_routed_and_base_rows(tmp_path):
    """In one batch in which every slot is taken: a head of as many labels as the base's, one of
    more, a reward head of one, LoRA on the base's head, a routed adapter, and the base."""
    model = base()
    model.save_pretrained(tmp_path / "base")
    heads = {
        "same": peft(tmp_path / "same", 1, task_type="SEQ_CLS"),
        "more": peft(tmp_path / "more", 2, labels=MOST, task_type="SEQ_CLS"),
        "reward": peft(tmp_path / "reward", 3, labels=1, task_type="SEQ_CLS"),
        "on-score": peft(tmp_path / "on-score", 4, target_modules=["o_proj", "score"]),
    }
    adapter = random_adapter(model.config, 5, targets=("q_proj", "o_proj"))
    write_native(adapter, tmp_path / "routed")
    wanted = {(name, i): probabilities(m, p) for name, m in heads.items()
              for i, p in enumerate(PROMPTS)}  # fmt: skip
    plain = [probabilities(model, p) for p in PROMPTS]
    with apply_adapter(model, adapter):
        wanted |= {("routed", i): probabilities(model, p) for i, p in enumerate(PROMPTS)}
    for row in wanted.values():
        assert len(row) != LABELS or (row - plain[0]).abs().max() > 1e-3

    llm = make_engine(
        tmp_path / "base", runner="pooling", enforce_eager=True, max_loras=5, max_cpu_loras=5,
        max_lora_cls_labels=MOST, max_num_batched_tokens=256,
    )  # fmt: skip
    try:
        # The last slot's LoRA on the head is what stock adds to rows of the base on a CPU.
        names = [*sorted({name for name, _ in wanted} - {"on-score"}), "on-score"]
        requests = [(p, lora(f"cls-{n}", tmp_path / n)) for p in PROMPTS for n in names]
        want = [wanted[n, i] for i in range(len(PROMPTS)) for n in names]
        requests += [(p, None) for p in PROMPTS]
        for _ in range(2):
            got = classify(llm, requests)
            diffs = [(g - w).abs().max().item() for g, w in zip(got, want + plain, strict=True)]
            print("classification: largest difference of a probability", f"{max(diffs):.1e}")
            assert max(diffs) < BOUND
        for name, (folder, code) in wrong(tmp_path / "same", tmp_path).items():
            with pytest.raises(AdapterError) as caught:
                llm.llm_engine.add_lora(lora(f"cls-{name}", folder))
            assert caught.value.code == code, name
        assert (classify(llm, requests[-1:])[0] - plain[-1]).abs().max() < BOUND
    finally:
        close(llm)
