"""A tiny Whisper, encoder and decoder, and what it answers under adapters of its decoder."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from integration_tests.engines import greedy, worst
from integration_tests.other_bases import Kind
from integration_tests.reference_model import worn
from vllm_lora_ext.conditions.column import Prompt

VOCABULARY, RATE = 512, 16_000
CONFIG = WhisperConfig(
    vocab_size=VOCABULARY, d_model=64, encoder_layers=2, decoder_layers=2,
    encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=96, decoder_ffn_dim=96,
    num_mel_bins=80, max_source_positions=50, max_target_positions=64, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, suppress_tokens=None,
    begin_suppress_tokens=None, scale_embedding=False,
)  # fmt: skip
ENCODER_ROWS = ("model.encoder.layers.0", "model.decoder.layers.1.encoder_attn")
DECODER = "model.decoder."
TARGETS = ("q_proj", "out_proj", "fc1", "fc2")  # read the decoder's own states
LAYERS = rf"{re.escape(DECODER)}.*\.({'|'.join(TARGETS)})"
REFUSED = dict.fromkeys(("MixLoRA block", "user", "instruction"), "unknown_module")


def write(folder: Path) -> Any:
    """The model, written with its processor; one second of sound is all that it hears."""
    torch.manual_seed(0)
    net = WhisperForConditionalGeneration(CONFIG).float().eval()
    with torch.no_grad():
        for weights in net.parameters():
            weights.add_(0.05 * torch.randn_like(weights))
    net.save_pretrained(folder)
    words = {f"<{i:03}>": i for i in range(VOCABULARY - 2)}
    words |= {"<|endoftext|>": VOCABULARY - 2, "<|startoftranscript|>": VOCABULARY - 1}
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = WhisperTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=1)
    WhisperProcessor(extractor, tokenizer).save_pretrained(folder)
    return net


def sounds(count: int) -> list[np.ndarray]:
    """A second of noise each."""
    rng = np.random.default_rng(3)
    return [rng.normal(size=RATE).astype(np.float32) * 0.1 for _ in range(count)]


def errors(llm: Any, net: Any, found: dict[str, Kind]) -> dict[str, float]:
    """Of each kind the largest difference of a log-probability in greedy answers, from transformers
    on the same tokens; two sounds and all kinds in one batch."""
    prompts = ([3, 17, 40, 5, 6, 99], [3, 200, 5, 6, 11, 12, 13, 14])
    heard = sounds(len(prompts))
    asked = [(n, k, i) for n, k in found.items() for i in range(len(prompts))]
    outputs = llm.generate(
        [_prompt(heard[i], prompts[i]) for *_, i in asked],
        [
            greedy(6, logprobs=-1, extra_args={"lora_ext": k.says} if k.says else None)
            for _, k, _ in asked
        ],
        lora_request=[k.request for _, k, _ in asked], use_tqdm=False,
    )  # fmt: skip
    numbers: dict[str, float] = {}
    for (name, kind, i), output in zip(asked, outputs, strict=True):
        ids = [*prompts[i], *output.outputs[0].token_ids]
        want = expected(net, kind, heard[i], ids)[len(prompts[i]) - 1 : -1]
        got = torch.full(want.shape, float("nan"))
        for row_V, entries in zip(got, output.outputs[0].logprobs, strict=True):
            for token, entry in entries.items():
                row_V[token] = entry.logprob
        numbers[name] = max(numbers.get(name, 0.0), worst(got, want))
        plain = expected(net, Kind(), heard[i], ids)[len(prompts[i]) - 1 : -1]
        assert name == "base" or (want - plain).abs().max() > 0.2, f"{name} does next to nothing"
    return numbers


def expected(net: Any, kind: Kind, sound: np.ndarray, ids: list[int]) -> torch.Tensor:
    """[T, V] logits by transformers."""
    features = WhisperFeatureExtractor(feature_size=80, chunk_length=1)(
        sound, sampling_rate=RATE, return_tensors="pt"
    ).input_features
    prompt = Prompt(len(ids), ids, {})
    with torch.inference_mode(), ExitStack() as hooks:
        for adapter in kind.wears:
            hooks.enter_context(worn(net, adapter, prompt))
        logits: torch.Tensor = net(
            input_features=features, decoder_input_ids=torch.tensor([ids])
        ).logits[0]
    return logits


def _prompt(sound: np.ndarray, ids: list[int]) -> Any:
    return {
        "encoder_prompt": {"prompt": "", "multi_modal_data": {"audio": (sound, RATE)}},
        "decoder_prompt": {"prompt_token_ids": ids},
    }
