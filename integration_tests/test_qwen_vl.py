"""A tiny Qwen2.5-VL end to end: adapters on the language model, the tower and the connector."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from integration_tests import other_bases
from integration_tests.conditioned import Case, ask, check
from integration_tests.engines import close, lora, make_engine
from integration_tests.vision import HERE, Asked, Look, Seer, in_language_model, qwen2_5_vl, trained
from tests.make_adapters import random_adapter, random_module, router_spec
from vllm_lora_ext.adapters import load_adapter
from vllm_lora_ext.adapters.model import RoutedAdapter
from vllm_lora_ext.adapters.readers.native import write_native
from vllm_lora_ext.errors import AdapterError

pytestmark = pytest.mark.engine
PATTERNS = {
    "text": r".*language_model.*\.(q_proj|v_proj|down_proj|gate_proj)",
    "tower": r".*visual\.blocks.*\.(qkv|proj|gate_proj|down_proj)",
    "connector": r".*visual\.merger\.mlp\.(0|2)",
    "all": r".*(q_proj|qkv|up_proj)|.*visual\.merger\.mlp\.2",
}
SEEING = ("tower", "connector", "all", "routed tower")


def text(seed: int, length: int) -> tuple[int, ...]:
    return tuple(int(t) for t in np.random.default_rng(seed).integers(7, 160, length))


@pytest.fixture(scope="module")
def seer(tmp_path_factory: pytest.TempPathFactory) -> Seer:
    return qwen2_5_vl(tmp_path_factory.mktemp("qwen") / "base")


@pytest.fixture(scope="module")
def looks(seer: Seer) -> dict[str, Look]:
    red, green, blue = seer.pictures(3)
    image = (4, HERE, 5)
    return {
        "no image": Look(text(2, 20)),
        "one": Look((*text(0, 5), *image, *text(1, 6)), (red,)),
        "several": Look((*image, *text(4, 9), *image, *image, *text(5, 4)), (green, red, blue)),
        "in chunks": Look((*text(6, 60), *image, *text(7, 70), *image, *text(8, 9)), (blue, red)),
    }


def routed_tower(seed: int) -> RoutedAdapter:
    """A router at layers of the tower and of the merger."""
    rng, sizes = np.random.default_rng(seed), {"model.visual.merger.mlp.0": (256, 256)}
    for i in (0, 1):
        sizes[f"model.visual.blocks.{i}.attn.proj"] = 64, 64
        sizes[f"model.visual.blocks.{i}.mlp.up_proj"] = 64, 96
    modules = {name: random_module(rng, *size, router_spec()) for name, size in sizes.items()}
    return RoutedAdapter(modules, "random")


@pytest.fixture(scope="module")
def wardrobe(
    seer: Seer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Any, Any, Any]]:
    """Name → what a request names, the adapter, and the model under it where PEFT has made it."""
    root = tmp_path_factory.mktemp("adapters")
    nets = {
        name: trained(seer.net, root / name, pattern, seed)
        for seed, (name, pattern) in enumerate(PATTERNS.items())
    }
    text_config = seer.net.config.text_config
    write_native(random_adapter(text_config, 3, router_spec()), root / "routed")
    write_native(routed_tower(4), root / "routed tower")
    other_bases.mix_block(seer.net, "model.language_model.layers.1.mlp", root, "qwen")
    return {
        path.name: (
            lora(f"qwen-{path.name}", path), in_language_model(load_adapter(path)),
            nets.get(path.name),
        )
        for path in root.iterdir()
    }  # fmt: skip


@pytest.fixture(scope="module")
def cases(seer: Seer, looks: dict[str, Look], wardrobe: dict[str, Any]) -> list[Case]:
    asked = [Asked(f"base, {key}", look) for key, look in looks.items()]
    for name, (request, adapter, net) in wardrobe.items():
        wears = () if net else (adapter,)
        asked += [
            Asked(f"{name}, {key}", look, wears, request, net=net) for key, look in looks.items()
        ]
    return [one.case(seer) for one in asked]


@pytest.fixture(scope="module")
def llm(seer: Seer, wardrobe: dict[str, Any]) -> Iterator[Any]:
    engine = make_engine(
        seer.folder, skip_tokenizer_init=False, enforce_eager=True, max_loras=4,
        limit_mm_per_prompt={"image": 3, "video": 0}, enable_tower_connector_lora=True,
    )  # fmt: skip
    for request, *_ in wardrobe.values():
        engine.llm_engine.add_lora(request)
    yield engine
    close(engine)


def test_the_cases_tell_adapters_apart(cases: list[Case]) -> None:
    last = {case.key: torch.log_softmax(case.logits[0], -1) for case in cases}
    for name in ("text", "routed", "mix", *SEEING):
        for look in ("one", "several", "in chunks"):
            assert (last[f"{name}, {look}"] - last[f"base, {look}"]).abs().max() > 0.02, name


def test_numbers_of_transformers(llm: Any, cases: list[Case]) -> None:
    """Everybody in one batch, more adapters than slots, then alone; prompts of several steps."""
    shuffled = [cases[i] for i in np.random.default_rng(0).permutation(len(cases))]
    check(shuffled, ask(llm, shuffled, skip_reading_prefix_cache=True))
    for case in cases[:6]:
        check([case], ask(llm, [case], skip_reading_prefix_cache=True))
    check(shuffled, ask(llm, shuffled))
    outputs = ask(llm, shuffled)
    check(shuffled, outputs)
    found = {c.key: o.num_cached_tokens for c, o in zip(shuffled, outputs, strict=True)}
    assert min(n for key, n in found.items() if "in chunks" in key) >= 128


def test_an_image_is_encoded_anew_for_a_replaced_adapter(
    llm: Any, seer: Seer, looks: dict[str, Look], tmp_path: Any
) -> None:
    """By the same name and id: what the tower made of an image is known by its weights."""
    nets = {i: trained(seer.net, tmp_path / str(i), PATTERNS["tower"], 10 + i) for i in (0, 1)}
    folder = tmp_path / "here"
    for turn, i in enumerate((0, 1, 0)):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / str(i), folder)
        request = lora("qwen-here", folder)
        request.load_inplace = turn > 0
        llm.llm_engine.add_lora(request)
        request.load_inplace = False
        case = Asked("here", looks["several"], adapter=request, net=nets[i]).case(seer)
        check([case, case], ask(llm, [case, case]))


def test_mixes_of_adapters_of_the_tower(llm: Any, seer: Seer, looks: Any, wardrobe: Any) -> None:
    """Scales act on images too; what differs by token cannot, for a tower has no positions."""
    half = {"adapters": [{"name": "qwen-tower", "scale": 0.5}, {"name": "qwen-text"}]}
    adapter = wardrobe["tower"][1]
    halved = {n: _scaled(m, 0.5) for n, m in adapter.modules.items()}
    wears = RoutedAdapter(halved, "plain"), wardrobe["text"][1]
    case = Asked("half", looks["several"], wears, says=half).case(seer)
    check([case], ask(llm, [case]))
    for more in ({"modality": "image"}, {"spans": [[0, 4]]}):
        says = {"adapters": [{"name": "qwen-tower", **more}]}
        with pytest.raises(Exception, match="layers of the language model") as caught:
            ask(llm, [Case("", looks["one"].prompt, [0], torch.empty(0, 160), says=says)])
        error = AdapterError.parse(str(caught.value))
        assert error is not None and error.code == "unsupported_feature"
    check([case], ask(llm, [case]))


def _scaled(module: Any, factor: float) -> Any:
    return type(module)(**{**vars(module), "b_NR": factor * module.b_NR})
