"""DoRA in a worker: norms of the base weights it has, beside others, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.make_adapters import BASE_LLAMA, BASE_QWEN2, normal, random_adapter
from tests.model_patches.conftest import make_harness
from tests.model_patches.test_deriving import code, recipe
from tests.ranks import Ranks
from vllm_lora_ext.adapters.dora import rescaled
from vllm_lora_ext.adapters.model import RoutedAdapter
from vllm_lora_ext.adapters.registry import load_adapter
from vllm_lora_ext.routing import GateSpec, delta_reference

ATTENTION = "model.layers.0.self_attn"
QKV, O_PROJ = f"{ATTENTION}.qkv_proj", f"{ATTENTION}.o_proj"
GATE_UP = "model.layers.0.mlp.gate_up_proj"


def dora(config: Any, seed: int, targets: tuple[str, ...] = ("q_proj", "v_proj", "o_proj")) -> Any:
    adapter = random_adapter(config, seed, GateSpec(), targets=targets)
    rng = np.random.default_rng(seed)
    modules = {
        name: replace(m, magnitude_N=normal(rng, len(m.b_NR)).abs() + 0.5)
        for name, m in adapter.modules.items()
    }
    return replace(adapter, modules=modules)


class Base:
    """A harness whose model has its weights: as vLLM packs them on a CPU, or as they are."""

    def __init__(self, folder: Path, base: Path = BASE_LLAMA, **options: Any) -> None:
        folder.mkdir()
        self.h = make_harness(folder, {}, {"model": str(base)} | options, weights=True)
        self.weights = load_file(base / "model.safetensors")

    def save(self, name: str, adapter: RoutedAdapter) -> Any:
        return self.h.save(name, adapter)

    def want(self, request: Any, parts: list[str], x_TK: torch.Tensor) -> torch.Tensor:
        """A layer's output, its parts side by side, in plain fp32; None: the base's."""
        modules = load_adapter(request.lora_path).modules if request else {}
        found = []
        for part in parts:
            weight, bias = self.weights[f"{part}.weight"], self.weights.get(f"{part}.bias")
            y_TN = torch.nn.functional.linear(x_TK, weight, bias)
            if part in modules:
                module = rescaled(part, modules[part], weight, bias)
                if module.rescale is not None:
                    y_TN = y_TN * module.rescale.scale_N + module.rescale.shift_N
                y_TN = y_TN + delta_reference(module, x_TK)
            found.append(y_TN)
        return torch.cat(found, dim=1)

    def got(self, layer: str, requests: list[Any], x_TK: torch.Tensor) -> torch.Tensor:
        """The layer itself, one row for each request."""
        self.h.step(*requests)
        output = self.h.manager.modules[layer](x_TK)
        return output[0] if isinstance(output, tuple) else output


LAYERS = {
    QKV: [f"{ATTENTION}.{p}" for p in ("q_proj", "k_proj", "v_proj")],
    O_PROJ: [O_PROJ],
    GATE_UP: ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"],
}


@pytest.fixture(scope="module", params=[BASE_LLAMA, BASE_QWEN2], ids=["llama", "qwen2"])
def base(request: Any, tmp_path_factory: Any) -> Base:
    """Qwen2 has biases on q, k and v."""
    return Base(tmp_path_factory.mktemp("dora") / "adapters", request.param, max_loras=3,
                max_cpu_loras=3)  # fmt: skip


def test_beside_others_in_one_batch(base: Base) -> None:
    """Some slices of a fused layer, other adapters and the base: everyone gets its own."""
    config = base.h.config.model_config.hf_config
    one = base.save("dora", dora(config, 1))
    other = base.save(
        "all", dora(config, 2, ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
    )
    routed = base.save("routed", random_adapter(config, 3))
    for request in (one, other, routed):
        base.h.worker.load(request, None, ())
    requests = [one, None, other, routed, one, None, other]
    for layer, parts in LAYERS.items():
        width = base.weights[f"{parts[0]}.weight"].shape[1]
        x_TK = normal(np.random.default_rng(0), len(requests), width)
        want = torch.cat([base.want(r, parts, x_TK[i : i + 1]) for i, r in enumerate(requests)])
        got = base.got(layer, requests, x_TK)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        alone = base.got(layer, [None] * len(requests), x_TK)
        assert torch.equal(got[[1, 5]], alone[[1, 5]])
    for request in (one, other, routed):
        base.h.worker.remove_adapter(request.lora_int_id)


def test_weights_are_read_packed_and_as_they_are(
    tmp_path: Path, harness: Callable[..., Any]
) -> None:
    """The unit matrix gives the very weights."""
    from vllm_lora_ext.model_patches.dora import _columns

    packed = Base(tmp_path / "a").h.manager.modules[QKV]
    plain = harness().manager.modules[QKV]
    shape = plain.base_layer.weight.shape
    assert packed.base_layer.weight.shape != shape, "vLLM keeps another form"
    own = torch.randn(shape)
    plain.base_layer.weight.data.copy_(own)
    weights = load_file(BASE_LLAMA / "model.safetensors")
    for layer, want in (
        (plain, own), (packed, torch.cat([weights[f"{p}.weight"] for p in LAYERS[QKV]])),
    ):  # fmt: skip
        assert torch.equal(torch.cat([w for _, w in _columns(layer)], dim=1), want)


def test_it_is_no_difference(harness: Callable[..., Any]) -> None:
    """It is served alone at its layers, whole, or not at all."""
    h = harness()
    config = h.config.model_config.hf_config
    one, far = (
        h.save("one", dora(config, 1, ("o_proj",))),
        h.save("far", dora(config, 2, ("up_proj",))),
    )
    near = h.random("near", specs=GateSpec(), targets=["o_proj"])
    for request in (one, far, near):
        h.worker.load(request, None, ())
    for parts, said in (
        ([(one, 0.5)], {}), ([(one, 1.0)], {"by_row": True}), ([(one, 1.0), (near, 1.0)], {}),
        ([(near, 1.0), (one, 1.0)], {}),
    ):  # fmt: skip
        assert code(h.worker.load, recipe(h, *parts, **said), None, ()) == "unsupported_feature"
    both = recipe(h, (one, 1.0), (far, 1.0))
    h.worker.load(both, None, ())
    x_TK = normal(np.random.default_rng(0), 3, 128)
    torch.testing.assert_close(h.delta(O_PROJ, both, x_TK), h.delta(O_PROJ, one, x_TK))
    assert h.delta(GATE_UP, both, x_TK).any()


def test_where_there_is_nothing_to_rescale(harness: Callable[..., Any]) -> None:
    h = harness()
    config = h.config.model_config.hf_config
    adapter = dora(config, 1)
    head = replace(adapter.modules[O_PROJ], b_NR=torch.randn(512, 6), magnitude_N=torch.ones(512))
    request = h.save("head", replace(adapter, modules={"lm_head": head}))
    assert code(h.worker.load, request, None, ()) == "unsupported_feature"


def test_quantised_weights_are_refused(harness: Callable[..., Any]) -> None:
    h = harness()
    h.manager.modules[O_PROJ].base_layer.quant_method = SimpleNamespace()
    request = h.save("dora", dora(h.config.model_config.hf_config, 1))
    assert code(h.worker.load, request, None, ()) == "unsupported_feature"
    fine = h.save("fine", dora(h.config.model_config.hf_config, 1, ("up_proj",)))
    h.worker.load(fine, None, ())


def test_new_base_weights_end_what_hangs_on_the_old(harness: Callable[..., Any]) -> None:
    """vLLM tells the LoRA manager; requests for it then load it anew."""
    h = harness()
    config = h.config.model_config.hf_config
    one, plain = h.save("dora", dora(config, 1)), h.random("plain", specs=GateSpec())
    for request in (one, plain):
        h.worker.load(request, None, ())
    mixed = recipe(h, (one, 1.0))
    h.worker.load(mixed, None, ())
    layer = h.manager.modules[O_PROJ]
    x_TK = normal(np.random.default_rng(0), 2, 128)
    before = h.delta(O_PROJ, one, x_TK)
    h.runner.maybe_remove_all_loras(h.config.lora_config)
    assert len(h.worker.versions()) == 3, "a dummy batch changes nothing"
    layer.base_layer.weight.data.mul_(2).add_(0.1)
    h.runner.reset_lora_state()
    assert set(h.worker.versions()) == {plain.lora_int_id}
    h.worker.load(one, None, ())
    assert not torch.allclose(h.delta(O_PROJ, one, x_TK), before)


class TwoRanks:
    """`agreement`'s collectives over threads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm_lora_ext.model_patches import agreement

        self.ranks, self.said = Ranks(), [None, None]
        group = SimpleNamespace(world_size=2, cpu_group=None)
        monkeypatch.setattr(agreement, "get_tp_group", lambda: group)
        monkeypatch.setattr(torch.distributed, "all_gather_object", self._gather)
        monkeypatch.setattr(torch.distributed, "all_reduce", self._sum)
        self.run, self.with_ranks = self.ranks.run, agreement.with_ranks

    def _gather(self, every: list[Any], mine: Any, group: Any) -> None:
        self.said[self.ranks._here.rank] = mine
        self.ranks._meet()
        every[:] = list(self.said)
        self.ranks._meet()

    def _sum(self, t: torch.Tensor, group: Any) -> None:
        t.copy_(self.ranks.sum_(t))


def halves(harness: Callable[..., Any]) -> tuple[list[Any], Any]:
    """Two workers whose `o_proj` believes that its input is a shard."""
    workers, h = [], None
    torch.manual_seed(0)
    weight_NK = torch.randn(128, 256)
    for rank in range(2):
        h = harness()
        layer = h.manager.modules[O_PROJ]
        layer.x_is_shard, layer.tp_size, layer.tp_rank = True, 2, rank
        layer.base_layer.weight.data.copy_(weight_NK[:, 128 * rank : 128 * rank + 128])
        workers.append(h)
    return workers, weight_NK


def test_norms_of_a_sharded_row_are_summed(
    harness: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    workers, weight_NK = halves(harness)
    rng, two = np.random.default_rng(1), TwoRanks(monkeypatch)
    adapter = dora(workers[0].config.model_config.hf_config, 1, ("o_proj",))
    wide = replace(adapter.modules[O_PROJ], a_RK=normal(rng, 6, 256))
    adapter = replace(adapter, modules={O_PROJ: wide}, digest="d")
    for h in workers:
        shapes = h.worker._adapter_manager.placer._shapes
        shapes[O_PROJ] = (256, 128)
    requests = [h.save("dora", adapter) for h in workers]
    x_TK = normal(rng, 4, 256)
    two.run(lambda rank: workers[rank].worker.load(requests[rank], None, ()))
    assert two.ranks.summed == [(128,)]
    want = rescaled(O_PROJ, wide, weight_NK, None)
    got = torch.zeros(4, 128)
    for rank, h in enumerate(workers):
        own = x_TK[:, 128 * rank : 128 * rank + 128].contiguous()
        base = own @ weight_NK[:, 128 * rank : 128 * rank + 128].t()
        h.step(*[requests[rank]] * 4)
        got += h.manager.modules[O_PROJ]._apply_lora_to_output(own, base)
    y_TN = x_TK @ weight_NK.t() * want.rescale.scale_N + delta_reference(want, x_TK)
    torch.testing.assert_close(got, y_TN, rtol=1e-4, atol=1e-3)


def test_a_rank_that_fails_leaves_none_waiting(
    harness: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever one rank meets, all of them come back from the load."""
    workers, _ = halves(harness)
    two = TwoRanks(monkeypatch)
    adapter = dora(workers[0].config.model_config.hf_config, 1, ("up_proj", "down_proj"))
    requests = [h.save("dora", adapter) for h in workers]
    down = "model.layers.0.mlp.down_proj"
    for h in workers:
        h.manager.modules[down].x_is_shard = True  # its whole row, which is enough here
    shutil.rmtree(workers[1].folder / "dora")
    codes = two.run(lambda rank: code(workers[rank].worker.load, requests[rank], None, ()))
    assert codes == ["ranks_differ", "not_found"]
    workers[1].save("dora", adapter)
    plain = [h.random("plain", specs=GateSpec(), targets=["o_proj"], layers=[1]) for h in workers]
    two.run(lambda rank: workers[rank].worker.load(plain[rank], None, ()))
    held = two.run(lambda rank: workers[rank].worker.load(plain[rank], None, ()))
    assert held[0].version == held[1].version
