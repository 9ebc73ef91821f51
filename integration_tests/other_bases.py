"""Every kind of adapter for any base model, and what transformers makes of each.

Gates are smooth: which experts a router chooses is proved elsewhere, and a base of few bits would
choose others where two nearly tie. Asked are log-probabilities after every position of a prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from integration_tests.engines import greedy, lora, worst
from integration_tests.followed import HEAD, INSTRUCTION, MADE, USERS, instructed, write_made
from integration_tests.reference_model import where, worn
from tests import dora_folders
from tests.make_adapters import random_module
from vllm_lora_ext.adapters import RoutedAdapter, load_adapter
from vllm_lora_ext.adapters.model import LowRank, MixBlock
from vllm_lora_ext.adapters.readers.native import write_native
from vllm_lora_ext.conditions.column import Column, Prompt
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging import Term, load_factors, merge, save_peft
from vllm_lora_ext.routing import GateSpec

EXPERTS = GateSpec("router", blocks=(2, 3, 2), score="softmax")
RANKS = GateSpec("router", blocks=(1,) * 6, score="sigmoid")
INVOCATION = (5, 6)
STRENGTH = 0.15


@dataclass(frozen=True)
class Kind:
    """One row of the matrix on some base: how it is asked for, and what the base then wears."""

    wears: Sequence[RoutedAdapter] = ()
    request: Any = None
    says: dict[str, Any] = field(default_factory=dict)


def prompts(vocabulary: int, count: int = 2) -> list[list[int]]:
    """Random ones of 12 tokens and more, with the invocation in their midst."""
    rng, found = np.random.default_rng(2), []
    for i in range(count):
        ids = rng.integers(7, vocabulary, 10 + 30 * i).tolist()
        found.append([*ids[:5], *INVOCATION, *ids[5:]])
    return found


def kinds(
    net: nn.Module, targets: Iterable[str], folder: Path, tag: str, under: str = ""
) -> dict[str, Kind]:
    """Random adapters on a model's linears, each written to a folder.

    Args:
        targets: last parts of the adapted layers' names; under: their beginning.
        tag: what the names of the adapters begin with.
    """
    shapes = {
        name: (layer.in_features, layer.out_features) for name, layer in net.named_modules()
        if isinstance(layer, nn.Linear) and name.rsplit(".", 1)[-1] in set(targets)
        and name.startswith(under)
    }  # fmt: skip
    assert shapes
    made = {
        name: _random(shapes, seed, spec) for seed, (name, spec) in enumerate(
            {"one": GateSpec(), "two": GateSpec(), "routed": EXPERTS, "ranks": RANKS}.items()
        )
    }  # fmt: skip
    for name in ("routed", "ranks"):
        write_native(made[name], folder / name)
    for name in ("one", "two"):
        _write_plain(made[name], folder / name)
    _write_plain(made["two"], folder / "invoked", alora_invocation_tokens=list(INVOCATION))
    terms = [Term(load_factors(folder / n), w, n) for n, w in (("one", 0.6), ("two", -0.5))]
    save_peft(merge("cat", terms).factors, folder / "merged")
    asked = {name: lora(f"{tag}-{name}", folder / name) for name in _names(folder)}
    one, two = made["one"], made["two"]
    scaled = (Column(scale=0.5), Column(scale=-0.7))
    spans = (Column(spans=((0, 6),)), Column(scale=1.5, spans=((4, None),)))
    return {
        "base": Kind(),
        "plain": Kind([one], asked["one"]),
        "merged": Kind([load_adapter(folder / "merged")], asked["merged"]),
        "routed linear": Kind([made["routed"]], asked["routed"]),
        "rank-wise": Kind([made["ranks"]], asked["ranks"]),
        "several, scaled": _several(tag, (one, two), scaled),
        "spans": _several(tag, (one, two), spans),
        "Activated LoRA": Kind([load_adapter(folder / "invoked")], asked["invoked"]),
    }


def mix_block(net: nn.Module, mlp: str, folder: Path, tag: str) -> Kind:
    """MixLoRA over one MLP of three linears, its router smooth."""
    rng, block = np.random.default_rng(9), net.get_submodule(mlp)
    spec, parts = GateSpec("router", blocks=(2, 2, 2), score="softmax"), {}
    for name in ("gate_proj", "up_proj", "down_proj"):
        layer = block.get_submodule(name)
        made = random_module(rng, layer.in_features, layer.out_features, GateSpec(), 6, STRENGTH)
        parts[name] = LowRank(made.a_RK, made.b_NR)
    width = block.get_submodule("gate_proj").in_features
    router = random_module(rng, width, 1, spec).router_GK
    assert router is not None
    adapter = RoutedAdapter({}, "random", blocks={mlp: MixBlock(spec, router, parts)})
    write_native(adapter, folder / "mix")
    return Kind([adapter], lora(f"{tag}-mix", folder / "mix"))


def dora(net: nn.Module, targets: Iterable[str], folder: Path, tag: str) -> Kind:
    dora_folders.make(folder / "dora", net, target_modules=list(targets))
    return Kind([load_adapter(folder / "dora")], lora(f"{tag}-dora", folder / "dora"))


def completed(net: nn.Module, folder: Path, tag: str) -> dict[str, Kind]:
    """A user's and an instruction's, on a model of `followed.BASE`'s shape."""
    write_made(folder)
    user, ids = [0.5, -1.0, 2.0, 0.25, 1.5, -0.5, 1.0, 0.75], list(range(20, 31))
    request = {name: lora(f"{tag}-{name}", folder / name) for name in MADE}
    template = load_adapter(folder / USERS[0]).template
    user = user[: template.user]
    made = template.derive(torch.tensor(user), None)
    of_text = load_adapter(folder / INSTRUCTION, head_size=HEAD).template
    says = {"instruction": {"ids": ids}}
    return {
        "user": Kind([made], request[USERS[0]], {"user": user}),
        "instruction": Kind([instructed(net, of_text, ids)], request[INSTRUCTION], says),
    }


def refusals(llm: Any, found: dict[str, Kind]) -> dict[str, str]:
    """The code of each kind that this base's engine refuses; the others are loaded."""
    codes = {}
    for name, kind in found.items():
        try:
            if kind.request is not None:
                llm.llm_engine.add_lora(kind.request)
        except AdapterError as error:
            codes[name] = error.code
    return codes


def load(llm: Any, folder: Path, tag: str) -> None:
    """What mixes name."""
    for name in ("one", "two"):
        llm.llm_engine.add_lora(lora(f"{tag}-{name}", folder / name))


def errors(llm: Any, net: nn.Module, found: dict[str, Kind], vocabulary: int) -> dict[str, float]:
    """Of each kind the largest difference of a log-probability from transformers', all kinds and
    prompts in one batch, twice."""
    asked = [(name, kind, ids) for ids in prompts(vocabulary) for name, kind in found.items()]
    wanted = [expected(net, kind.wears, ids) for _, kind, ids in asked]
    base = {len(i): w for (name, _, i), w in zip(asked, wanted, strict=True) if name == "base"}
    numbers: dict[str, float] = dict.fromkeys(found, 0.0)
    for _ in range(2):
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for *_, ids in asked],
            [_params(kind) for _, kind, _ in asked],
            lora_request=[kind.request for _, kind, _ in asked], use_tqdm=False,
        )  # fmt: skip
        for (name, _, ids), output, want in zip(asked, outputs, wanted, strict=True):
            numbers[name] = max(numbers[name], worst(_rows(output, want.shape), want))
            moved = (want - base[len(ids)]).abs().max().item()
            assert name == "base" or moved > 0.3, f"{name} does next to nothing"
    return numbers


def expected(net: nn.Module, wears: Sequence[RoutedAdapter], ids: list[int]) -> torch.Tensor:
    """[T, V] logits by transformers."""
    with torch.inference_mode(), ExitStack() as hooks:
        for adapter in wears:
            hooks.enter_context(worn(net, adapter, Prompt(len(ids), ids, {})))
        logits: torch.Tensor = net(input_ids=torch.tensor([ids])).logits[0]
    return logits.float()


def _params(kind: Kind) -> Any:
    said = {"lora_ext": kind.says} if kind.says else None
    return greedy(1, prompt_logprobs=-1, logprobs=-1, extra_args=said)


def _rows(output: Any, shape: torch.Size) -> torch.Tensor:
    got = torch.full(shape, float("nan"))
    for i, row in enumerate([*output.prompt_logprobs[1:], *output.outputs[0].logprobs]):
        for token, entry in row.items():
            got[i, token] = entry.logprob
    return got


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.is_dir()]


def _several(
    tag: str, adapters: Sequence[RoutedAdapter], columns: Sequence[Column]
) -> Kind:  # fmt: skip
    says = []
    for name, column in zip(("one", "two"), columns, strict=True):
        given = column.to_dict()
        says.append({"name": f"{tag}-{name}", **given})
    wears = [where(a, c) for a, c in zip(adapters, columns, strict=True)]
    return Kind(wears, None, {"adapters": says})


def _random(shapes: dict[str, tuple[int, int]], seed: int, spec: GateSpec) -> RoutedAdapter:
    rng = np.random.default_rng(seed)
    modules = {n: random_module(rng, k, out, spec, 4, STRENGTH) for n, (k, out) in shapes.items()}
    return RoutedAdapter(modules, system="random")


def _write_plain(adapter: RoutedAdapter, folder: Path, **config: Any) -> None:
    """As PEFT saves it."""
    from safetensors.torch import save_file

    tensors, rank = {}, 1
    for name, module in adapter.modules.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = module.a_RK
        tensors[f"base_model.model.{name}.lora_B.weight"] = module.b_NR
        rank = module.rank
    targets = sorted({name.rsplit(".", 1)[-1] for name in adapter.modules})
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    own = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(own | config))
