"""LoRA on fused experts in vLLM's own layers, built as for a GPU; their kernels do not run here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from vllm_lora_ext.errors import AdapterError

WIDTH, INNER, EXPERTS = 64, 48, 4
SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip
# Model → its experts' layer in transformers 5 and in vLLM, and names of an expert's linears.
KINDS = {
    "qwen3_moe": ("mlp", "mlp", ("gate_proj", "down_proj", "up_proj")),
    "mixtral": ("mlp", "block_sparse_moe", ("w1", "w2", "w3")),
    "gpt_oss": ("mlp", "mlp", None),
}
Q_PROJ = "model.layers.0.self_attn.q_proj"


def model_of(kind: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    many = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "intermediate_size": INNER}
    own: dict[str, dict[str, Any]] = {
        "qwen3_moe": {"head_dim": 32, "moe_intermediate_size": INNER, "num_experts": EXPERTS,
                      "num_experts_per_tok": 2, "intermediate_size": 96},
        "mixtral": many,
        "gpt_oss": many | {"head_dim": 32, "layer_types": ["full_attention"] * 2},
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL, **own[kind])
    return AutoModelForCausalLM.from_config(config).float().eval()


@pytest.fixture(autouse=True)
def expert_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose first model had no experts has none."""
    import vllm.distributed.parallel_state as groups

    from tests.model_patches.conftest import _start

    _start()
    if groups._EP is None:
        monkeypatch.setattr(groups, "_EP", groups._TP)


@pytest.fixture
def moe(
    harness: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[..., Any]]:
    """Harnesses of tiny mixture-of-experts models with the layers that they have on a GPU."""
    import vllm.lora.utils as lora_utils
    import vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method as moe_method
    import vllm.model_executor.model_loader.utils as loading
    from vllm.lora.layers import FusedMoE3DWithLoRA, FusedMoEWithLoRA

    choose = moe_method.select_unquantized_moe_backend.__wrapped__
    monkeypatch.setattr(moe_method, "select_unquantized_moe_backend", choose)
    wrappers = (*lora_utils._all_lora_classes, FusedMoEWithLoRA, FusedMoE3DWithLoRA)
    monkeypatch.setattr(lora_utils, "_all_lora_classes", wrappers)
    build = loading.initialize_model

    def initialize_model(config: Any) -> Any:
        model = build(config)
        for module in model.modules():
            if type(module).__name__.endswith("RoutedExperts"):
                for weights in module.parameters():
                    weights.data.zero_()
                module.quant_method.process_weights_after_loading(module)
        return model

    monkeypatch.setattr(loading, "initialize_model", initialize_model)

    def make(kind: str, **options: Any) -> Any:
        model = model_of(kind)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(tmp_path / kind)
        return harness(model=str(tmp_path / kind), max_lora_rank=32, **options)

    yield make


def peft_folder(folder: Path, kind: str, **config: Any) -> Any:
    """A random adapter as PEFT saves it, and the model that it is on."""
    torch.manual_seed(1)
    own = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj"], "target_parameters":
           ["experts.gate_up_proj", "experts.down_proj"]} | config  # fmt: skip
    model = get_peft_model(model_of(kind), LoraConfig(**own, init_lora_weights=False))
    model.save_pretrained(folder)
    return model


def request(folder: Path, number: int = 1, **fields: Any) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(folder.name, number, str(folder), **fields)


def deltas(layer: Any, slot: int) -> list[torch.Tensor]:
    """What stock's layer adds to the weights of each expert, [E, out, in] of gate and up, down."""
    tables = [(layer.w13_lora_a_stacked, layer.w13_lora_b_stacked),
              (layer.w2_lora_a_stacked, layer.w2_lora_b_stacked)]  # fmt: skip
    return [
        torch.cat([b[slot] @ a[slot] for a, b in zip(*pair, strict=True)], 1) for pair in tables
    ]


def peft_deltas(model: Any, block: str) -> dict[str, torch.Tensor]:
    """By parameter, [E, out, in]."""
    found, layer = {}, model.get_submodule(f"base_model.model.{block}")
    while hasattr(layer, "base_layer"):
        delta = layer.get_delta_weight("default")
        turned = layer._did_swap_in_out_features
        found[layer.parameter_name] = (delta if turned else delta.transpose(1, 2)).detach()
        layer = layer.base_layer
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_all_experts_at_once_as_peft_saves_them(
    moe: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    """Beside a routed adapter in the other slot; and as stock's own loader has it."""
    theirs, ours, _ = KINDS[kind]
    model = peft_folder(tmp_path / "peft", kind, rank_pattern={".*\\.down_proj": 2},
                        alpha_pattern={".*\\.gate_up_proj": 5})  # fmt: skip
    h = moe(kind, enable_mixed_moe_lora_format=kind != "gpt_oss")
    routed = h.random("routed", targets=("q_proj", "o_proj")) if kind == "qwen3_moe" else None
    number = 7
    h.worker.load(request(tmp_path / "peft", number), None, ())
    if routed is not None:
        h.worker.load(routed, None, ())
        assert h.manager.active_ids() == {number, routed.lora_int_id}
    slot = h.manager.lora_index_to_id.index(number)
    for i in range(2):
        layer = h.manager.modules[f"model.layers.{i}.{ours}.experts"]
        want = peft_deltas(model, f"model.layers.{i}.{theirs}.experts")
        got = dict(zip(("gate_up_proj", "down_proj"), deltas(layer, slot), strict=True))
        for name, delta in want.items():
            assert delta.abs().max() > 0.01
            torch.testing.assert_close(got[name], delta, rtol=1e-4, atol=1e-5)
        assert layer.adapter_enabled.tolist()[:2] == [int(s == slot) for s in range(2)]
        assert all(t[1 - slot].abs().max() == 0 for t in _tables(layer))
    held = h.worker._residency.get(number)
    assert held.nbytes >= sum(t.nbytes for pair in held.model.host.stock.values()
                              for part in pair for t in part)  # fmt: skip
    if theirs == ours:
        same_as_stock(h, tmp_path / "peft", slot, is_3d_lora_weight=True)
    h.worker.remove_adapter(number)
    assert all(t.abs().max() == 0 for t in _tables(layer))


def _tables(layer: Any) -> list[torch.Tensor]:
    return [*layer.w13_lora_a_stacked, *layer.w13_lora_b_stacked, *layer.w2_lora_a_stacked,
            *layer.w2_lora_b_stacked]  # fmt: skip


def same_as_stock(h: Any, folder: Path, slot: int, **fields: Any) -> None:
    """Stock's loader, then stock's manager, puts the same numbers into the slot; and we do, where a
    tool hands over what stock's loader makes."""
    from vllm_lora_ext.model_patches import foreign

    ours = {n: [t[slot].clone() for t in _tables(m)] for n, m in h.manager.modules.items()
            if n.endswith(".experts")}  # fmt: skip
    lora = h.worker._load_adapter(request(folder, 9, **fields))
    given = foreign.host_form(lora, h.manager.placer)
    assert given is not None and given.stock.keys() == ours_of(h, slot).stock.keys()
    for name, weights in given.stock.items():
        torch.testing.assert_close(weights, ours_of(h, slot).stock[name])
    h.manager._create_merged_loras_inplace(lora)
    for name, own in ours.items():
        layer, weights = h.manager.modules[name], lora.get_lora(name)
        layer.reset_lora(slot)
        if weights is not None:
            layer.set_lora(slot, weights.lora_a, weights.lora_b)
        for mine, stock in zip(own, _tables(layer), strict=True):
            torch.testing.assert_close(mine, stock[slot], rtol=1e-6, atol=1e-7)


def ours_of(h: Any, slot: int) -> Any:
    return h.manager.get_adapter(h.manager.lora_index_to_id[slot]).host


def each_folder(folder: Path, kind: str, names: tuple[str, ...], experts: int = EXPERTS) -> Any:
    """LoRA on single experts, as PEFT wrote it for transformers 4; and its tensors."""
    g, tensors = torch.Generator().manual_seed(2), {}
    for name in names:
        down = name in ("down_proj", "w2")
        width, out = (INNER, WIDTH) if down else (WIDTH, INNER)
        for e in range(experts):
            where = f"base_model.model.model.layers.1.{KINDS[kind][1]}.experts.{e}.{name}"
            tensors[f"{where}.lora_A.weight"] = torch.randn(4, width, generator=g)
            tensors[f"{where}.lora_B.weight"] = torch.randn(out, 4, generator=g)
    write(folder, tensors, target_modules=list(names))
    return tensors


def write(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> None:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | config
    (folder / "adapter_config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_each_expert_by_itself(moe: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    """All linears of the experts, then some of them, which stock does not take."""
    gate, down, up = KINDS[kind][2]  # type: ignore[misc]
    h = moe(kind)
    layer = h.manager.modules[f"model.layers.1.{KINDS[kind][1]}.experts"]
    for number, names in ((1, (gate, down, up)), (2, (gate, up))):
        tensors = each_folder(tmp_path / f"each{number}", kind, names)
        h.worker.load(request(tmp_path / f"each{number}", number), None, ())
        slot = h.manager.lora_index_to_id.index(number)
        first, last = deltas(layer, slot)

        def delta(name: str, e: int, tensors: Any = tensors) -> torch.Tensor:
            where = f"base_model.model.model.layers.1.{KINDS[kind][1]}.experts.{e}.{name}"
            pair = tensors[f"{where}.lora_B.weight"], tensors[f"{where}.lora_A.weight"]
            return 2 * pair[0] @ pair[1]

        for e in range(EXPERTS):
            want = torch.cat([delta(gate, e), delta(up, e)])
            torch.testing.assert_close(first[e], want, rtol=1e-4, atol=1e-4)
            want = delta(down, e) if down in names else torch.zeros(WIDTH, INNER)
            torch.testing.assert_close(last[e], want, rtol=1e-4, atol=1e-4)
        if down in names:
            same_as_stock(h, tmp_path / f"each{number}", slot)


def test_one_parameter_and_the_router(moe: Callable[..., Any], tmp_path: Path) -> None:
    """PEFT's names do not say which of the two parameters it is; the config does."""
    targets = ["mlp.experts.gate_up_proj", "gate.weight"]
    model = peft_folder(tmp_path / "one", "qwen3_moe", target_parameters=targets,
                        target_modules=[], alpha_pattern={"gate.weight": 3})  # fmt: skip
    h = moe("qwen3_moe")
    h.worker.load(request(tmp_path / "one"), None, ())
    first, last = deltas(h.manager.modules["model.layers.0.mlp.experts"], 0)
    want = peft_deltas(model, "model.layers.0.mlp.experts")["gate_up_proj"]
    torch.testing.assert_close(first, want, rtol=1e-4, atol=1e-5)
    assert last.abs().max() == 0
    gate = model.get_submodule("base_model.model.model.layers.0.mlp.gate")
    x = torch.randn(5, WIDTH)
    want = x @ gate.get_delta_weight("default").T
    got = h.delta("model.layers.0.mlp.gate", request(tmp_path / "one"), x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_model_of_one_format_names_the_flag_for_both(
    moe: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "each"
    tensors = {
        f"base_model.model.model.layers.0.mlp.experts.0.gate_proj.lora_{p}.weight": torch.ones(s)
        for p, s in (("A", (4, WIDTH)), ("B", (INNER, 4)))
    }
    write(folder, tensors)
    with pytest.raises(AdapterError, match="--enable-mixed-moe-lora-format"):
        moe("gpt_oss").worker.load(request(folder), None, ())


def test_experts_with_a_defect(moe: Callable[..., Any], tmp_path: Path) -> None:
    peft_folder(tmp_path / "good", "qwen3_moe")
    good = load_file(tmp_path / "good" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "good" / "adapter_config.json").read_text())
    block = "base_model.model.model.layers.0.mlp.experts"
    a, b = f"{block}.base_layer.lora_A.weight", f"{block}.base_layer.lora_B.weight"
    poisoned = good[a].clone()
    poisoned[3, 3] = float("inf")
    cases: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "not_finite": ({a: poisoned}, {}),
        "shape_mismatch": ({a: good[a][:12], b: good[b][:, :12]}, {}),
        "rank_mismatch": ({a: good[a][:13], b: good[b][:, :13]}, {}),
        "missing_tensor": ({b: None}, {}),
        "rank_too_large": ({a: torch.ones(64 * EXPERTS, WIDTH), b: torch.ones(96, 64 * EXPERTS)},
                           {"rank_pattern": {"layers.0.mlp.experts.gate_up_proj": 64}}),
        "unknown_module": ({a: None, b: None, f"{block[:-7]}other.experts.lora_A.weight": good[a],
                            f"{block[:-7]}other.experts.lora_B.weight": good[b]},
                           {"target_parameters": ["gate_up_proj"]}),
        "unsupported_feature": ({a: None, b: None}, {"target_parameters": ["experts.other"]}),
    }  # fmt: skip
    h = moe("qwen3_moe", max_loras=1, max_cpu_loras=1)
    for number, (code, (tensors, fields)) in enumerate(cases.items(), 1):
        own = {n: t.contiguous() for n, t in (good | tensors).items() if t is not None}
        write(tmp_path / code, own, **(config | fields))
        with pytest.raises(AdapterError) as caught:
            h.worker.load(request(tmp_path / code, number), None, ())
        assert caught.value.code == code
    assert h.worker.list_adapters() == set()


def test_target_modules_leave_experts_out(moe: Callable[..., Any], tmp_path: Path) -> None:
    peft_folder(tmp_path / "all", "qwen3_moe")
    h = moe("qwen3_moe", lora_target_modules=["qkv_proj"])
    h.worker.load(request(tmp_path / "all"), None, ())
    assert set(h.manager.get_adapter(1).host.names) == {
        f"model.layers.{i}.self_attn.qkv_proj" for i in range(2)
    }


def test_a_cpu_says_that_it_does_not_compute_them(
    harness: Callable[..., Any], tmp_path: Path
) -> None:
    from vllm_lora_ext.adapters.registry import load_adapter

    peft_folder(tmp_path / "all", "qwen3_moe")
    model = model_of("qwen3_moe")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path / "base")
    h = harness(model=str(tmp_path / "base"))
    each_folder(tmp_path / "each", "qwen3_moe", ("gate_proj",))
    for name in ("all", "each"):
        with pytest.raises(AdapterError, match="on a GPU only") as caught:
            h.worker.load(request(tmp_path / name), None, ())
        assert caught.value.code == "unsupported_feature"
    with pytest.raises(AdapterError, match="only a server holds"):  # other tools would drop it
        load_adapter(tmp_path / "all")
