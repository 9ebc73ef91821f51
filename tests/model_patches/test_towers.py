"""LoRA on the tower and connector of a multimodal model, by vLLM's own manager, against PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.make_adapters import random_module, router_spec
from tests.model_patches.conftest import Harness, make_harness
from vllm_lora_ext.adapters.hf import apply_adapter
from vllm_lora_ext.adapters.model import RoutedAdapter
from vllm_lora_ext.adapters.readers.native import write_native
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.routing import GateSpec, delta_reference

IMAGE, PATCH, HIDDEN, MERGED = 56, 14, 64, 2
PATCHES = (IMAGE // PATCH) ** 2
TOKENS = PATCHES // MERGED**2
TOWER, CONNECTOR = (
    "model.vision_model.encoder.layers.{}.",
    "model.connector.modality_projection.proj",
)
LINEARS = {"self_attn.q_proj": (64, 64), "self_attn.out_proj": (64, 64), "mlp.fc1": (64, 96)}


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A tiny Idefics3: SigLIP, one linear layer, Llama; in transformers, and a folder of it."""
    import transformers as tf
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    vision = {
        "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": IMAGE, "patch_size": PATCH,
    }  # fmt: skip
    text = tf.LlamaConfig(
        vocab_size=512, hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
    )  # fmt: skip
    config = tf.Idefics3Config(
        vision_config=vision, text_config=text.to_dict(), scale_factor=MERGED, image_token_id=3
    )
    torch.manual_seed(0)
    model = tf.Idefics3ForConditionalGeneration(config).float().eval()
    folder = tmp_path_factory.mktemp("towers") / "base"
    model.save_pretrained(folder)
    special = ["<pad>", "<bos>", "<eos>", "<image>", "<fake_token_around_image>", "<global-img>",
               "<end_of_utterance>"]  # fmt: skip
    words = {word: i for i, word in enumerate([*special, "?"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="?", bos_token="<bos>", eos_token="<eos>",
        pad_token="<pad>", additional_special_tokens=special[3:],
    )  # fmt: skip
    size = {"longest_edge": IMAGE}
    images = Idefics3ImageProcessorPil(size=size, max_image_size=size, do_image_splitting=False)
    tf.Idefics3Processor(images, fast, image_seq_len=TOKENS).save_pretrained(folder)
    return model, folder


@pytest.fixture
def harness_of(towers: tuple[Any, Path], tmp_path: Path) -> Callable[..., Harness]:
    def make(**options: Any) -> Harness:
        folder = tmp_path / f"adapters{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        given = {
            "model": str(towers[1]), "skip_tokenizer_init": False, "max_loras": 3,
            "max_cpu_loras": 3, "limit_mm_per_prompt": {"image": 1},
        }  # fmt: skip
        return make_harness(folder, {}, given | options, weights=True)

    return make


def trained(base: Any, folder: Path, pattern: str) -> Any:
    """The model with an adapter that PEFT has saved to `folder`."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=pattern, init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    model.save_pretrained(folder)
    return model.base_model.model


def routed(folder: Path) -> RoutedAdapter:
    """A router at layers of the tower and at the connector."""
    rng = np.random.default_rng(1)
    shapes = {TOWER.format(i) + name: shape for i in (0, 1) for name, shape in LINEARS.items()}
    shapes[CONNECTOR] = HIDDEN * MERGED**2, HIDDEN
    modules = {name: random_module(rng, *shape, router_spec()) for name, shape in shapes.items()}
    adapter = RoutedAdapter(modules, "random")
    write_native(adapter, folder)
    return adapter


def features(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What transformers' tower and connector make of images, [images, TOKENS, HIDDEN]."""
    inner = model.model
    mask = torch.ones(len(pixels), IMAGE // PATCH, IMAGE // PATCH, dtype=torch.bool)
    return inner.connector(
        inner.vision_model(pixel_values=pixels, patch_attention_mask=mask).last_hidden_state
    )


def see(h: Harness, requests: Collection[Any], ids: tuple[int, ...], pixels: Any) -> torch.Tensor:
    """vLLM's tower and connector, as its model runner prepares them: one image for each id."""
    from vllm.lora.layers import LoRAMappingType

    for kind, count in (
        (LoRAMappingType.LANGUAGE, TOKENS), (LoRAMappingType.TOWER, PATCHES),
        (LoRAMappingType.CONNECTOR, TOKENS),
    ):  # fmt: skip
        rows = tuple(i for i in ids for _ in range(count))
        h.runner._set_active_loras(ids, rows, set(requests), kind)
    one_each = {
        "pixel_attention_mask": torch.ones(len(ids), IMAGE, IMAGE, dtype=torch.bool),
        "num_patches": torch.ones(len(ids), dtype=torch.long),
    }
    with torch.inference_mode():
        return torch.stack(list(h.model.embed_multimodal(pixel_values=pixels, **one_each)))


PATTERN = r".*vision_model.*(q_proj|out_proj|fc1)|.*modality_projection\.proj|.*o_proj"


@torch.no_grad()
def test_images_of_base_plain_and_routed_rows(
    harness_of: Callable[..., Harness], towers: tuple[Any, Path]
) -> None:
    """In one batch; the language model's layers of the same adapter are in its slot as well."""
    from vllm.lora.request import LoRARequest

    base, _ = towers
    h = harness_of(enable_tower_connector_lora=True)
    peft = trained(base, h.folder / "plain", PATTERN)
    adapter = routed(h.folder / "routed")
    requests = [LoRARequest(n, i, str(h.folder / n)) for i, n in ((1, "plain"), (2, "routed"))]
    for request in requests:
        h.worker.add_adapter(request)
    pixels = torch.randn(4, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(2))
    with apply_adapter(base, adapter):
        gated = features(base, pixels)
    plain, wanted = features(peft, pixels), features(base, pixels)
    assert min((x - wanted).abs().mean().item() for x in (plain, gated)) > 0.01
    for ids in ((1, 0, 2, 1), (0, 2, 2, 0), (0, 0, 0, 0), (1, 1, 2, 0)):
        want = torch.stack([(wanted, plain, gated)[who][i] for i, who in enumerate(ids)])
        error = (see(h, requests, ids, pixels) - want).abs().max().item()
        print(f"images of {ids}: largest difference {error:.1e}")
        assert error < 2e-4
    name, x_TK = "model.text_model.layers.0.self_attn.o_proj", torch.randn(5, HIDDEN)
    layer = peft.get_submodule(name)
    want = layer(x_TK) - layer.base_layer(x_TK)
    torch.testing.assert_close(h.delta(name, requests[0], x_TK), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pattern", [r".*vision_model.*q_proj", r".*modality_projection\.proj"])
def test_without_the_flag_the_refusal_names_it(
    harness_of: Callable[..., Harness], towers: tuple[Any, Path], pattern: str
) -> None:
    from vllm.lora.request import LoRARequest

    h = harness_of()
    trained(towers[0], h.folder / "tower", pattern)
    with pytest.raises(AdapterError, match="--enable-tower-connector-lora") as caught:
        h.worker.add_adapter(LoRARequest("tower", 1, str(h.folder / "tower")))
    assert caught.value.code == "unsupported_feature"
    trained(towers[0], h.folder / "text", r".*text_model.*(q|o)_proj")
    assert h.worker.add_adapter(LoRARequest("text", 2, str(h.folder / "text")))
    assert h.worker.list_adapters() == {2}


def test_the_language_models_own_names(
    harness_of: Callable[..., Harness], towers: tuple[Any, Path]
) -> None:
    """As an adapter has them that was trained on the language model alone: plain and routed; two
    names for one layer, and a layer that it does not have, are refused."""
    from vllm.lora.request import LoRARequest

    h, rng, x_TK = harness_of(), np.random.default_rng(5), torch.randn(5, HIDDEN)
    whole, own = "model.text_model.layers.0.self_attn.o_proj", "model.layers.0.self_attn.o_proj"
    for i, spec in enumerate((GateSpec(), router_spec()), 1):
        module = random_module(rng, HIDDEN, HIDDEN, spec)
        write_native(RoutedAdapter({own: module}, "random"), h.folder / str(i))
        request = LoRARequest(str(i), i, str(h.folder / str(i)))
        h.worker.add_adapter(request)
        want = delta_reference(module, x_TK)
        torch.testing.assert_close(h.delta(whole, request, x_TK), want, atol=1e-4, rtol=1e-4)
    for wrong, code in (
        ({own: module, whole: module}, "duplicate_tensor"),
        ({own.replace("layers.0", "layers.7"): module}, "unknown_module"),
    ):
        write_native(RoutedAdapter(wrong, "random"), h.folder / code)
        with pytest.raises(AdapterError) as caught:
            h.worker.add_adapter(LoRARequest(code, 9, str(h.folder / code)))
        assert caught.value.code == code
