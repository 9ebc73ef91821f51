"""What goes into vLLM's own layers: classification heads and fused experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.host_syncs import host_syncs, page_locked  # noqa: F401
from tests.steps import Steps, onto_device
from vllm_lora_ext.adapters.model import Head, RoutedAdapter, RoutedModule
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.residency import HostAdapter
from vllm_lora_ext.routing import GateSpec

LABELS, MOST, WIDTH = 3, 5, 128
O_PROJ = "model.layers.0.self_attn.o_proj"


@pytest.fixture
def classifier(harness: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Harnesses of a tiny classification model, the weights of its head known."""
    from transformers import Qwen2Config

    def make(**options: Any) -> Any:
        Qwen2Config(
            vocab_size=512, hidden_size=WIDTH, intermediate_size=192, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, num_labels=LABELS, pad_token_id=0,
            tie_word_embeddings=False, architectures=["Qwen2ForSequenceClassification"],
        ).save_pretrained(tmp_path / "base")  # fmt: skip
        given = {"max_loras": 2, "max_cpu_loras": 2} | options
        h = harness(model=str(tmp_path / "base"), runner="pooling", **given)
        score = h.manager.modules["score"].base_layer
        torch.nn.init.normal_(score.weight)
        score.cpu_linear = torch.nn.functional.linear  # as when weights were loaded
        return h

    return make


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(width: int, out: int, seed: int = 0, rank: int = 4) -> RoutedModule:
    return RoutedModule(normal(rank, width, seed=seed), normal(out, rank, seed=seed + 1))


def load(h: Any, number: int, adapter: RoutedAdapter) -> HostAdapter:
    """Past the reader, which the engine tests cover: into a slot, and what the host keeps."""
    from vllm_lora_ext.model_patches.manager import RoutedLoRAModel

    host = h.manager.placer.place(dataclasses.replace(adapter, digest=str(number)))
    h.manager.register(RoutedLoRAModel(number, host))
    h.manager.activate_adapter(number)
    assert isinstance(host, HostAdapter)
    return host


def rows(h: Any, *ids: int) -> None:
    from vllm.lora.layers import LoRAMapping

    h.manager.set_adapter_mapping(LoRAMapping(ids, ids, is_prefill=True))


def test_heads_and_lora_on_the_head(classifier: Callable[..., Any]) -> None:
    """Rows of the base keep the base's, also where the last slot has LoRA on the head."""
    h = classifier(max_lora_cls_labels=MOST)
    head, lora = Head(normal(MOST, WIDTH), normal(MOST)), low_rank(WIDTH, LABELS, 2)
    host = load(
        h, 1, RoutedAdapter({O_PROJ: low_rank(WIDTH, WIDTH)}, "plain", heads={"score": head})
    )
    load(h, 2, RoutedAdapter({"score": lora}, "plain"))
    plain = load_bytes(h, RoutedAdapter({O_PROJ: low_rank(WIDTH, WIDTH)}, "plain"))
    assert host.nbytes == plain + 4 * MOST * WIDTH + 256  # tensors begin at multiples of that
    layer, x = h.manager.modules["score"], normal(3, WIDTH, seed=9)
    base = x @ layer.base_layer.weight.T
    rows(h, 1, 2, 0)
    got = layer(x)
    torch.testing.assert_close(got[0], x[0] @ head.weight_NK.T + head.bias_N)
    torch.testing.assert_close(
        got[1], base[1] + lora.b_NR @ (lora.a_RK @ x[1]), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(got[2], base[2])
    rows(h, 0, 0, 2)
    torch.testing.assert_close(layer(x)[:2], base[:2])
    # Out of the slot, and another in it.
    h.manager.remove_adapter(1)
    assert layer.full_module_num_labels == [0, 0]
    load(h, 3, RoutedAdapter({O_PROJ: low_rank(WIDTH, WIDTH)}, "plain"))
    rows(h, 3, 3, 0)
    torch.testing.assert_close(layer(x), base)


def heads(h: Any) -> None:
    """One with LoRA on the head and one with a head of its own, in host memory."""
    from vllm_lora_ext.model_patches.manager import RoutedLoRAModel

    head = Head(normal(LABELS, WIDTH), normal(LABELS))
    lora = RoutedAdapter({"score": low_rank(WIDTH, LABELS, 2)}, "plain")
    for number, adapter in enumerate((RoutedAdapter({}, "plain", heads={"score": head}), lora), 1):
        h.manager.register(RoutedLoRAModel(number, h.manager.placer.place(adapter)))


def test_a_step_only_copies(
    classifier: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    h = classifier(max_loras=1, dtype="bfloat16")
    heads(h)
    steps = Steps(monkeypatch, strided=True)
    for number in (1, 2, 1):
        with steps.watch():
            h.manager.activate_adapter(number)
    assert steps.copies == 3 * 2
    layer = h.manager.modules["score"]
    assert torch.equal(layer.full_bias_stacked[0], normal(LABELS))  # stock's is in float32


def test_no_step_waits(classifier: Callable[..., Any], page_locked: set[int]) -> None:  # noqa: F811
    h = classifier(max_loras=1, dtype="bfloat16")
    h.manager.placer._pinned = True
    heads(h)
    onto_device([h.manager.modules["score"]])
    with host_syncs(page_locked) as seen:
        for number in (1, 2, 1):
            h.manager.activate_adapter(number)
    assert seen == []


def test_a_model_that_a_tool_hands_over(classifier: Callable[..., Any]) -> None:
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import LoRAFullModuleWeights, LoRALayerWeights

    from vllm_lora_ext.model_patches import foreign

    h, pair, head = classifier(), low_rank(WIDTH, WIDTH), normal(LABELS, WIDTH)
    weights = LoRALayerWeights(O_PROJ, 4, 4, pair.a_RK, pair.b_NR)
    saved = {"score": LoRAFullModuleWeights("score", head)}
    made = LoRAModel(1, 4, {O_PROJ: weights}, modules_to_save=saved)
    host = foreign.host_form(made, h.manager.placer, 64)
    assert O_PROJ in host.sites
    torch.testing.assert_close(host.heads["score"][0], head)
    saved["score"].weight[0, 0] = float("nan")
    with pytest.raises(AdapterError, match="NaN"):
        foreign.host_form(made, h.manager.placer, 64)


def load_bytes(h: Any, adapter: RoutedAdapter) -> int:
    return int(h.manager.placer.place(adapter).nbytes)


@pytest.mark.parametrize(
    ("options", "parts", "code", "says"),
    [
        ({}, {"heads": {"score": Head(normal(LABELS, WIDTH - 1))}}, "shape_mismatch", "width"),
        (
            {}, {"heads": {"score": Head(normal(MOST, WIDTH))}}, "shape_mismatch",
            f"--max-lora-cls-labels {MOST}",
        ),
        (
            {}, {"heads": {"classifier": Head(normal(LABELS, WIDTH))}}, "unsupported_feature",
            "score",
        ),
        (
            {"dtype": "float16"}, {"heads": {"score": Head(normal(LABELS, WIDTH) + 1e5)}},
            "overflow", "score",
        ),
        ({}, {"modules": {"score": low_rank(WIDTH, LABELS + 1)}}, "shape_mismatch", "score"),
        (
            {}, {"modules": {"score": dataclasses.replace(
                low_rank(WIDTH, LABELS), router_GK=normal(4, WIDTH),
                gate=GateSpec(source="router", score="softmax", blocks=(1,) * 4),
            )}}, "unsupported_feature", "gate",
        ),
        (
            {"pooler_config": {"task": "token_classify"}},
            {"heads": {"score": Head(normal(LABELS, WIDTH))}}, "unsupported_feature", "tokens",
        ),
    ],
)  # fmt: skip
def test_heads_that_do_not_fit(
    classifier: Callable[..., Any], options: dict[str, Any], parts: dict[str, Any], code: str,
    says: str,
) -> None:  # fmt: skip
    h = classifier(**options)
    with pytest.raises(AdapterError, match=says) as caught:
        h.manager.placer.place(RoutedAdapter(**({"modules": {}} | parts), system="plain"))
    assert caught.value.code == code


def test_a_bias_that_its_slot_cannot_hold(classifier: Callable[..., Any]) -> None:
    """In float32 by default, whatever the model's dtype."""
    h, head = classifier(dtype="float16"), Head(normal(LABELS, WIDTH), normal(LABELS) + 1e5)
    lane, adapter = h.manager.placer.lane, RoutedAdapter({}, "plain", heads={"score": head})
    assert h.manager.placer.place(adapter).heads["score"][1].max() > 9e4
    lane.heads["score"] = dataclasses.replace(lane.heads["score"], bias_dtype=torch.float16)
    with pytest.raises(AdapterError, match="bias of head score") as caught:
        h.manager.placer.place(adapter)
    assert caught.value.code == "overflow"


def test_a_server_that_generates_has_no_head(harness: Callable[..., Any]) -> None:
    head = Head(normal(LABELS, WIDTH))
    with pytest.raises(AdapterError, match="--runner pooling") as caught:
        harness().manager.placer.place(RoutedAdapter({}, "plain", heads={"score": head}))
    assert caught.value.code == "unsupported_feature"
