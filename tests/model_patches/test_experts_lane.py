"""LoRA on fused experts in vLLM's own layers, built as for a GPU; their kernels do not run here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.host_syncs import host_syncs, page_locked  # noqa: F401
from tests.make_adapters import random_module, router_spec
from tests.steps import Steps, onto_device
from vllm_lora_ext.adapters.model import RoutedAdapter
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
O_PROJ = "model.layers.0.self_attn.o_proj"
EXPERTS_OF_TWO = [f"model.layers.{i}.mlp.experts" for i in range(2)]


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
    assert held.nbytes >= sum(t.nbytes for own in held.host.stock.values() for t in own)
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
    given = foreign.host_form(lora, h.manager.placer, 32)
    assert given.stock.keys() == ours_of(h, slot).stock.keys()
    for name, weights in given.stock.items():
        torch.testing.assert_close(weights, ours_of(h, slot).stock[name])
    lora = h.worker._load_adapter(request(folder, 9, **fields))
    h.manager._create_merged_loras_inplace(lora)
    for name, own in ours.items():
        layer, weights = h.manager.modules[name], lora.get_lora(name)
        layer.reset_lora(slot)
        if weights is not None:
            layer.set_lora(slot, weights.lora_a, weights.lora_b)
        for mine, stock in zip(own, _tables(layer), strict=True):
            torch.testing.assert_close(mine, stock[slot], rtol=1e-6, atol=1e-7)


def test_a_step_only_copies(
    moe: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    page_locked: set[int],  # noqa: F811
) -> None:
    """All experts at once, each by itself, and one that a tool hands over for stock to form."""
    h = moe("qwen3_moe", max_loras=1, max_cpu_loras=3, enable_mixed_moe_lora_format=True)
    h.manager.placer._pinned = True
    peft_folder(tmp_path / "all", "qwen3_moe")
    each_folder(tmp_path / "each", "qwen3_moe", KINDS["qwen3_moe"][2])
    requests = [request(tmp_path / name, i) for i, name in enumerate(("all", "each"), 1)]
    for each in requests:
        h.worker.load(each, None, ())
    lora = h.worker._load_adapter(request(tmp_path / "all", 3, is_3d_lora_weight=True))
    lora.loras["model.layers.77.self_attn.q_proj"] = lora.loras[Q_PROJ]
    h.worker._residency.put(3, h.worker._foreign(lora), ())
    requests.append(request(tmp_path / "all", 3))
    steps, layers = Steps(monkeypatch, strided=True), []
    for each in (*requests[1:], requests[0], requests[2]):
        before = steps.copies
        with steps.watch():
            h.worker._apply_adapters({each})
        assert steps.copies - before in (2 * 6, 6)  # of two layers, of one
        layers.append([t.clone() for n in EXPERTS_OF_TWO for t in _tables(h.manager.modules[n])])
    for theirs, ours, again in zip(*layers[1:], strict=True):
        assert torch.equal(theirs, again)
        torch.testing.assert_close(ours, theirs)
    onto_device(h.manager.modules[n] for n in EXPERTS_OF_TWO)
    with host_syncs(page_locked) as seen:
        for each in requests[:2]:
            h.worker._apply_adapters({each})
    assert seen == []


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_rank_holds_its_part(
    moe: Callable[..., Any], tmp_path: Path, kind: str, sharded: bool
) -> None:
    """What stock's `set_lora` would cut in the step, of two ranks."""
    from vllm_lora_ext.model_patches.stock_lane import put

    h = moe(kind, enable_mixed_moe_lora_format=kind != "gpt_oss")
    peft_folder(tmp_path / "peft", kind, r=32 if sharded else 4)
    lane, name = h.manager.placer.lane, "model.layers.0.mlp.experts"
    lora = h.worker._load_adapter(request(tmp_path / "peft", is_3d_lora_weight=True))
    lane.form(lora)
    weights, layer = lora.get_lora(name), h.manager.modules[name]
    layer.moe_config.intermediate_size_per_partition = INNER // 2
    h.config.lora_config.fully_sharded_loras = sharded
    for rank in range(2):
        layer.tp_size, layer.tp_rank = 2, rank
        layer.create_lora_weights(2, h.config.lora_config, h.config.model_config.hf_config)
        layer.set_lora(0, weights.lora_a, weights.lora_b)
        shapes, fill = lane.experts_layout(name, weights.lora_a, weights.lora_b)
        put(layer, 1, fill([torch.empty(shape, dtype=dtype) for shape, dtype in shapes]))
        assert layer.adapter_enabled.tolist()[:2] == [1, 1]
        for table in _tables(layer):
            assert table[0].abs().max() > 0 and torch.equal(table[0], table[1])
        nbytes = sum(torch.Size(shape).numel() for shape, _ in shapes)
        assert nbytes < sum(t.numel() for t in (*weights.lora_a, *weights.lora_b))


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


class Kernels:
    """Doubles of vLLM's Triton kernels of fused experts, the one for LoRA among them: in PyTorch,
    with the arguments and the meaning that the kernels have. Their callers are vLLM's own.

    Args:
        wrapper: the step's metadata, whose methods the kernels for LoRA are.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, wrapper: Any, limit: float) -> None:
        from vllm.model_executor.layers.fused_moe.experts import triton_moe

        self._wrapper, self._limit = wrapper, limit
        monkeypatch.setattr(triton_moe, "tl", SimpleNamespace(float32="float32"))
        monkeypatch.setattr(triton_moe, "try_get_optimal_moe_config", lambda *_, **__: {})
        monkeypatch.setattr(
            triton_moe, "_prepare_expert_assignment", lambda ids, *_, **__: (None, ids, None)
        )
        monkeypatch.setattr(triton_moe, "invoke_fused_moe_triton_kernel", self.product)
        monkeypatch.setattr(triton_moe.ops, "moe_sum", lambda y, out: out.copy_(y.sum(1)))
        monkeypatch.setattr(triton_moe.TritonExperts, "activation", self.activation)
        for name in ("add_lora_w13", "add_lora_w2"):
            monkeypatch.setattr(wrapper, name, getattr(self, name), raising=False)

    def product(
        self, x: torch.Tensor, w_ENK: torch.Tensor, out_TkN: torch.Tensor, _scale: Any,
        _w_scale: Any, weights_Tk: Any, _sorted: Any, ids_Tk: torch.Tensor, _padded: Any,
        weigh: bool, top_k: int, _config: Any, B_bias: Any = None, **_: Any,
    ) -> None:  # fmt: skip
        """y[t, j] = W[e] x, with e the j-th expert of token t."""
        x_TkK = x[:, None] if top_k > 1 else x.view(*ids_Tk.shape, -1)
        y = torch.einsum("tjnk,tjk->tjn", w_ENK[ids_Tk], x_TkK.expand(*ids_Tk.shape, -1))
        y = y if B_bias is None else y + B_bias[ids_Tk]
        out_TkN.copy_(y * weights_Tk[..., None] if weigh else y)

    def activation(self, kind: Any, out: torch.Tensor, x: torch.Tensor, **_: Any) -> None:
        if "oai" in kind.value:
            gate, up = x[:, ::2].clamp(max=self._limit), x[:, 1::2].clamp(-self._limit, self._limit)
            out.copy_((up + 1) * gate * torch.sigmoid(1.702 * gate))
        else:
            gate, up = x.chunk(2, -1)
            out.copy_(torch.nn.functional.silu(gate) * up)

    def _deltas(
        self, x_TkK: Any, a: Any, b: Any, ids_Tk: Any, enabled: torch.Tensor
    ) -> torch.Tensor:
        slots_T = self._wrapper.token_lora_indices[: len(ids_Tk)].clone()
        slots_T[slots_T >= 0] = slots_T[slots_T >= 0].where(enabled[slots_T[slots_T >= 0]] > 0, -1)
        parts = []
        for a_SERK, b_SENR in zip(a, b, strict=True):
            own = slots_T.clamp(min=0)[:, None], ids_Tk
            h = torch.einsum("tjrk,tjk->tjr", a_SERK[own], x_TkK.expand(*ids_Tk.shape, -1))
            parts.append(torch.einsum("tjnr,tjr->tjn", b_SENR[own], h))
        return torch.where(slots_T[:, None, None] >= 0, torch.cat(parts, -1), 0)

    def add_lora_w13(
        self, y: torch.Tensor, x: torch.Tensor, a: Any, b: Any, ids_Tk: torch.Tensor,
        _weights: Any, _map: Any, _w1: Any, _w2: Any, _tokens: int, _top_k_num: int,
        _max_loras: int, enabled: torch.Tensor, *_: Any, **__: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        y += self._deltas(x[:, None], a, b, ids_Tk, enabled)
        return None, ids_Tk, None, None

    def add_lora_w2(
        self, y: torch.Tensor, x: torch.Tensor, a: Any, b: Any, weights_Tk: torch.Tensor,
        _sorted: Any, ids_Tk: torch.Tensor, _padded: Any, _mapping: Any, _tokens: int, _w1: Any,
        _w2: Any, _top_k_num: int, _max_loras: int, enabled: torch.Tensor, *_: Any, **__: Any,
    ) -> None:  # fmt: skip
        delta = self._deltas(x.view(*ids_Tk.shape, -1), a, b, ids_Tk, enabled)
        y += delta * weights_Tk[..., None]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_one_step_as_peft_computes_them(
    moe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Experts' rows beside those of a routed adapter and of the base, through vLLM's own layer."""
    theirs, ours, _ = KINDS[kind]
    model = peft_folder(tmp_path / "peft", kind)
    hf = model.get_submodule(f"base_model.model.model.layers.0.{theirs}")
    routing: list[torch.Tensor] = []
    hf.experts.register_forward_pre_hook(lambda _, args: routing.extend(args[1:]))
    x_TK = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(3))

    def of_peft() -> torch.Tensor:
        with torch.no_grad():
            y = hf(x_TK[None])
        return (y[0] if isinstance(y, tuple) else y)[0]

    adapted = of_peft()
    with model.disable_adapter():
        base = of_peft()
    assert (adapted - base).abs().amax(1).min() > 1e-3
    ids_Tk, weights_Tk = sorted(routing[:2], key=torch.is_floating_point)
    h = moe(kind, enable_mixed_moe_lora_format=kind == "mixtral", max_num_seqs=16)
    linear = next(m for n, m in h.manager.modules.items() if n.endswith(".o_proj"))
    width, (out,) = linear.full_sizes()
    module = random_module(np.random.default_rng(0), width, out, router_spec())
    routed = h.save("routed", RoutedAdapter({O_PROJ: module}, "random"))
    experts = request(tmp_path / "peft", 7)
    for each in (routed, experts):
        h.worker.load(each, None, ())
    h.step(*(experts, routed, None) * 3)
    layer = h.manager.modules[f"model.layers.0.{ours}.experts"]
    fused, weights = layer._moe_kernel.fused_experts, layer.base_layer.routed_experts
    own = hf.experts
    while hasattr(own, "base_layer"):
        own = own.base_layer
    turn = kind == "gpt_oss"  # [E, in, out] there
    for name, mine in (("w13", own.gate_up_proj), ("w2", own.down_proj)):
        getattr(weights, f"{name}_weight").data.copy_(mine.transpose(1, 2) if turn else mine)
    if turn:
        weights.w13_bias.data.copy_(own.gate_up_proj_bias)
        weights.w2_bias.data.copy_(own.down_proj_bias)
        weights_Tk = (
            weights_Tk.gather(1, ids_Tk) if weights_Tk.shape != ids_Tk.shape else weights_Tk
        )
    Kernels(monkeypatch, layer.punica_wrapper, getattr(own, "limit", 0.0))
    out_TK = torch.empty(9, WIDTH)
    sizes = fused.workspace_shapes(
        9, 2 * INNER, WIDTH, ids_Tk.shape[1], EXPERTS, EXPERTS, None, weights.activation
    )
    with torch.inference_mode():
        fused.apply(
            out_TK, x_TK, weights.w13_weight, weights.w2_weight, weights_Tk, ids_Tk,
            weights.activation, EXPERTS, None, None, None,
            torch.empty(sizes[0]), torch.empty(sizes[1]), None, False,
        )  # fmt: skip
    want = torch.where(torch.arange(9)[:, None] % 3 == 0, adapted, base)
    torch.testing.assert_close(out_TK, want, rtol=1e-3, atol=1e-4)


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
