"""Tiny vision-language models made from configs, and what transformers answers in their place."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from integration_tests.conditioned import Case
from integration_tests.engines import base_path
from integration_tests.reference_model import where, worn
from vllm_lora_ext.adapters.model import RoutedAdapter
from vllm_lora_ext.conditions.column import Column, Prompt

LANGUAGE = "base_llama_mha"
PATCH, WIDTH = 14, 64
HERE = 3
"""The token that stands for an image in a prompt."""


@dataclass(frozen=True)
class Seer:
    """A model in transformers.

    Args:
        net: the model; folder: what vLLM serves; processor: of both.
        size: height and width of an image that nobody resizes; tokens: of such an image.
        typed: whether the model is told which tokens are which.
    """

    net: Any
    folder: Path
    processor: Any
    size: tuple[int, int]
    tokens: int
    typed: bool = False

    def pictures(self, count: int) -> list[Any]:
        """Random ones."""
        from PIL import Image

        shape = (count, *self.size, 3)
        pixels = np.random.default_rng(7).integers(0, 256, shape, dtype=np.uint8)
        return [Image.fromarray(a) for a in pixels]


@dataclass(frozen=True)
class Look:
    """A prompt with images: ids in which `HERE` stands for each of them."""

    ids: tuple[int, ...]
    images: tuple[Any, ...] = ()

    @property
    def prompt(self) -> dict[str, Any]:
        given: dict[str, Any] = {"prompt_token_ids": list(self.ids)}
        if self.images:
            given["multi_modal_data"] = {"image": list(self.images)}
        return given

    def expanded(self, seer: Seer) -> list[int]:
        """Its ids as the model reads them."""
        return [i for t in self.ids for i in ([t] * (seer.tokens if t == HERE else 1))]


@dataclass(frozen=True)
class Asked:
    """A request of a test: what it sends, and what transformers answers with.

    Args:
        wears: adapters by hooks; net: a model of its own, which has PEFT's layers.
    """

    key: str
    look: Look
    wears: tuple[RoutedAdapter, ...] = ()
    adapter: Any = None
    says: dict[str, Any] = field(default_factory=dict)
    net: Any = None

    def case(self, seer: Seer, count: int = 6) -> Case:
        tokens, logits = answer(seer, self.look, self.wears, count, self.net or seer.net)
        return Case(self.key, self.look.prompt, tokens, logits, self.adapter, self.says)


@torch.inference_mode()
def answer(
    seer: Seer, look: Look, adapters: Sequence[RoutedAdapter], count: int, net: Any
) -> tuple[list[int], torch.Tensor]:
    """transformers' greedy tokens, and the logits [count, V] that each is taken from."""
    ids, rows = look.expanded(seer), []
    given: dict[str, Any] = {}
    if look.images:
        given = dict(seer.processor.image_processor(list(look.images), return_tensors="pt"))
    for _ in range(count):
        spans = tuple((t, t + 1) for t, token in enumerate(ids) if token == HERE)
        prompt, here = Prompt(len(ids), ids, {"image": spans}), torch.tensor([ids])
        if seer.typed:
            given["mm_token_type_ids"] = (here == HERE).int()
        with ExitStack() as hooks:
            for adapter in adapters:
                hooks.enter_context(worn(net, adapter, prompt))
            rows.append(net(input_ids=here, **given).logits[0, -1])
        ids.append(int(rows[-1].argmax()))
    return ids[-count:], torch.stack(rows)


def by_kind(adapter: RoutedAdapter, kind: str) -> RoutedAdapter:
    """A plain adapter, at tokens of one kind of input only."""
    return where(adapter, Column(modalities=(kind,)))


def in_language_model(adapter: RoutedAdapter) -> RoutedAdapter:
    """The adapter of a language model, by the names that transformers has in the whole model."""

    def name(own: str) -> str:
        return re.sub(r"^model\.layers\.", "model.language_model.layers.", own)

    return replace(
        adapter,
        modules={name(n): m for n, m in adapter.modules.items()},
        blocks={name(n): b for n, b in adapter.blocks.items()},
    )


def trained(net: Any, folder: Path, pattern: str, seed: int = 0) -> Any:
    """A copy of the model under a random adapter, which PEFT saves in `folder`."""
    torch.manual_seed(seed)
    own = LoraConfig(r=4, lora_alpha=8, target_modules=pattern, init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(net), own).eval()
    model.save_pretrained(folder)
    return model.base_model.model


def llava(folder: Path) -> Seer:
    """LLaVA: CLIP, and the fixtures' Llama with its weights, so that their adapters fit it."""
    import transformers as tf
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    text = tf.AutoModelForCausalLM.from_pretrained(base_path(LANGUAGE), dtype=torch.float32)
    side = 4 * PATCH
    vision = tf.CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        image_size=side, patch_size=PATCH,
    )  # fmt: skip
    config = tf.LlavaConfig(
        vision_config=vision, text_config=text.config, image_token_index=HERE,
        vision_feature_layer=-1, vision_feature_select_strategy="default",
    )  # fmt: skip
    net = _random(tf.LlavaForConditionalGeneration(config))
    net.model.language_model.load_state_dict(text.model.state_dict())
    net.lm_head.load_state_dict(text.lm_head.state_dict())
    crop = {"height": side, "width": side}
    processor = tf.LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=crop),
        _tokenizer(tf, text.config.vocab_size, {"<image>": HERE}), patch_size=PATCH,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    _save(net, processor, folder)
    # vLLM looks for the tower's weights where transformers 4 wrote them.
    weights = load_file(folder / "model.safetensors")
    here, there = "vision_tower.", "vision_tower.vision_model."
    save_file(
        {n if there in n else n.replace(here, there): w for n, w in weights.items()},
        folder / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    return Seer(net, folder, processor, size=(side, side), tokens=16)


def qwen2_5_vl(folder: Path) -> Seer:
    """Qwen2.5-VL: a tower with windows, whose merger is the connector."""
    import transformers as tf
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    special = {
        "<|image_pad|>": HERE, "<|vision_start|>": 4, "<|vision_end|>": 5, "<|video_pad|>": 6,
    }  # fmt: skip
    config = tf.Qwen2_5_VLConfig(
        vision_config={
            "depth": 2, "hidden_size": WIDTH, "intermediate_size": 96, "num_heads": 2,
            "out_hidden_size": WIDTH, "patch_size": PATCH, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "window_size": 4 * PATCH, "fullatt_block_indexes": [1],
        },
        text_config={
            "vocab_size": 160, "hidden_size": WIDTH, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6],
            },
        },
        image_token_id=HERE, video_token_id=6, vision_start_token_id=4, vision_end_token_id=5,
        tie_word_embeddings=False,
    )  # fmt: skip
    net = _random(tf.Qwen2_5_VLForConditionalGeneration(config))
    pixels = (2 * PATCH) ** 2  # of one token
    size = {"shortest_edge": pixels, "longest_edge": 16 * pixels}
    sizes = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2, "size": size}
    processor = tf.Qwen2_5_VLProcessor(
        Qwen2VLImageProcessorPil(**sizes), _tokenizer(tf, 160, special),
        tf.Qwen2VLVideoProcessor(**sizes),
    )  # fmt: skip
    _save(net, processor, folder)
    return Seer(net, folder, processor, size=(4 * PATCH, 6 * PATCH), tokens=6, typed=True)


def _random(net: Any) -> Any:
    """Weights that keep activations near 1, so that an image matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in net.parameters():
            if weight.ndim > 1:
                width = weight[0].numel()
                weight.copy_(torch.randn(weight.shape, generator=generator) / width**0.5)
    return net.float().eval()


def _tokenizer(tf: Any, size: int, special: dict[str, int]) -> Any:
    """One word per token: `t17` is token 17."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    own = {number: name for name, number in special.items()}
    words = {own.get(i, f"t{i}"): i for i in range(size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="t0", pad_token="t0", bos_token="t1", eos_token="t2",
        additional_special_tokens=list(special),
    )  # fmt: skip


def _save(net: Any, processor: Any, folder: Path) -> None:
    net.save_pretrained(folder)
    processor.save_pretrained(folder)
