"""Every kind of adapter for any base model, and what transformers makes of each.

Gates are smooth: which experts a router chooses is proved elsewhere, and a base of few bits would
choose others where two nearly tie. Asked are log-probabilities after every position of a prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from integration_tests.engines import greedy, lora, worst
from integration_tests.followed import HEAD, INSTRUCTION, USERS, instructed, write_made
from integration_tests.reference_model import where, worn
from tests import dora_folders
from tests.make_adapters import normal, random_module
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
STRENGTH, NOISE = 0.15, 2e-6


@dataclass(frozen=True)
class Kind:
    """One row of the matrix on some base: how it is asked for, and what the base then wears."""

    wears: Sequence[Any] = ()  # adapters, or what puts one on a model
    request: Any = None
    says: dict[str, Any] = field(default_factory=dict)


def prompts(vocabulary: int, count: int = 2, seed: int = 2) -> list[list[int]]:
    """Random ones of 12 tokens and more, with the invocation in their midst."""
    rng, found = np.random.default_rng(seed), []
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
    shapes = _shapes(net, targets, under)
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
    """MixLoRA over one MLP, its router smooth; over three linears as Llama's has them where this
    one has others, to be refused."""
    rng, block = np.random.default_rng(9), net.get_submodule(mlp)
    spec, parts = GateSpec("router", blocks=(2, 2, 2), score="softmax"), {}
    config = net.config.get_text_config()
    wide, inner = config.hidden_size, getattr(config, "intermediate_size", 64)
    for name in ("gate_proj", "up_proj", "down_proj"):
        sizes = (inner, wide) if name == "down_proj" else (wide, inner)
        if isinstance(layer := getattr(block, name, None), nn.Linear):
            sizes = layer.in_features, layer.out_features
        made = random_module(rng, *sizes, GateSpec(), 6, STRENGTH)
        parts[name] = LowRank(made.a_RK, made.b_NR)
    router = random_module(rng, wide, 1, spec).router_GK
    assert router is not None
    adapter = RoutedAdapter({}, "random", blocks={mlp: MixBlock(spec, router, parts)})
    write_native(adapter, folder / "mix")
    return Kind([adapter], lora(f"{tag}-mix", folder / "mix"))


def dora(net: nn.Module, targets: Sequence[str] | str, folder: Path, tag: str) -> Kind:
    """
    Args:
        targets: last parts of the adapted layers' names, or a regular expression of them.
    """
    task = "CAUSAL_LM" if hasattr(net, "prepare_inputs_for_generation") else None
    dora_folders.make(folder / "dora", net, target_modules=targets, task_type=task)
    return Kind([load_adapter(folder / "dora")], lora(f"{tag}-dora", folder / "dora"))


def xlora(net: nn.Module, targets: Iterable[str], folder: Path, tag: str) -> Kind:
    """Three experts, each on all layers, and a classifier with smooth gates."""
    rng, hidden, names = np.random.default_rng(10), net.config.hidden_size, ("0", "1", "2")
    for i, name in enumerate(names):
        _write_plain(_random(_shapes(net, targets), 20 + i, GateSpec()), folder / "xlora" / name)
    stem = "base_model.internal_xlora_classifier.layers"
    tensors = {
        f"{stem}.{at}.{part}": normal(rng, *shape) / hidden**0.5
        for at, rows, width in ((0, 16, hidden), (3, len(names), 16))
        for part, shape in (("weight", (rows, width)), ("bias", (rows,)))
    }  # fmt: skip
    save_file(tensors, folder / "xlora" / "adapter_model.safetensors")
    config = {
        "peft_type": "XLORA", "adapters": {name: f"expert_{name}" for name in names},
        "hidden_size": hidden, "layerwise_scalings": False, "xlora_depth": 2, "xlora_size": 16,
        "enable_softmax": True, "softmax_temperature": 0.2,
    }  # fmt: skip
    (folder / "xlora" / "adapter_config.json").write_text(json.dumps(config))
    return Kind([load_adapter(folder / "xlora")], lora(f"{tag}-xlora", folder / "xlora"))


def completed(
    net: nn.Module, folder: Path, tag: str, every: bool = True, name: str = USERS[0]
) -> dict[str, Kind]:
    """A user's and an instruction's, on a model with attention of `followed.BASE`'s shape.

    Args:
        every: whether all layers have it, not only the first.
        name: which of `USERS`: queries alone, or keys and outputs.
    """
    write_made(folder)
    for adapter in () if every else (folder / name, folder / INSTRUCTION):
        _narrow(next(adapter.glob("*.safetensors")))
    user, ids = [0.5, -1.0, 2.0, 0.25, 1.5, -0.5, 1.0, 0.75], list(range(20, 31))
    request = {made: lora(f"{tag}-{made}", folder / made) for made in (name, INSTRUCTION)}
    template = load_adapter(folder / name).template
    user = user[: template.user]
    derived = _named(template.derive(torch.tensor(user), None), net)
    of_text = load_adapter(folder / INSTRUCTION, head_size=HEAD).template
    says = {"instruction": {"ids": ids}}
    return {
        "user": Kind([derived], request[name], {"user": user}),
        "instruction": Kind(
            [_named(instructed(net, of_text, ids), net)], request[INSTRUCTION], says
        ),
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


def errors(
    llm: Any, net: nn.Module, found: dict[str, Kind], vocabulary: int, steady: bool = False
) -> dict[str, float]:
    """Of each kind the largest difference of a log-probability from transformers', all kinds and
    prompts in one batch, twice.

    Args:
        steady: for models that round activations: only prompts on which nothing is near a tie.
    """
    asked = [
        (name, kind, ids) for name, kind in found.items()
        for ids in (steady_prompts(net, kind, vocabulary) if steady else prompts(vocabulary))
    ]  # fmt: skip
    numbers: dict[str, float] = dict.fromkeys(found, 0.0)
    wanted = [expected(net, kind.wears, ids) for _, kind, ids in asked]
    for (name, _, ids), want in zip(asked, wanted, strict=True):
        moved = (want - expected(net, (), ids)).abs().max().item()
        assert name == "base" or moved > 0.3, f"{name} does next to nothing"
    for _ in range(2):
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for *_, ids in asked],
            [_params(kind) for _, kind, _ in asked],
            lora_request=[kind.request for _, kind, _ in asked], use_tqdm=False,
        )  # fmt: skip
        for (name, *_), output, want in zip(asked, outputs, wanted, strict=True):
            numbers[name] = max(numbers[name], worst(_rows(output, want.shape), want))
    return numbers


def steady_prompts(net: nn.Module, kind: Kind, vocabulary: int, count: int = 2) -> list[list[int]]:
    """Random ones whose logits hardly move when the embeddings do.

    A value between two that its rounding knows goes to either, by the order of a sum, and takes
    all that follows with it: on such a prompt two right programs differ.
    """
    found = []
    for seed in range(200):
        (ids,) = prompts(vocabulary, 1, seed)
        quiet = expected(net, kind.wears, ids)
        with _disturbed(net, NOISE):
            noisy = [expected(net, kind.wears, ids) for _ in range(3)]
        if max((quiet - n).abs().max() for n in noisy) < 2e-3:
            found.append(ids)
        if len(found) == count:
            return found
    raise AssertionError("every prompt sits on a tie")


@contextmanager
def _disturbed(net: Any, noise: float) -> Iterator[None]:
    """Relatively, and anew in each call."""
    generator = torch.Generator().manual_seed(0)
    hook = net.get_input_embeddings().register_forward_hook(
        lambda *args: args[-1] * (1 + noise * torch.randn(args[-1].shape, generator=generator))
    )
    try:
        yield
    finally:
        hook.remove()


def expected(
    net: nn.Module, wears: Sequence[Any], ids: list[int],
    read: Callable[[Any], torch.Tensor] = lambda output: output.logits[0],
) -> torch.Tensor:  # fmt: skip
    """What is read of transformers' output; by default [T, V] logits."""
    with torch.inference_mode(), ExitStack() as hooks:
        for adapter in wears:
            own = isinstance(adapter, RoutedAdapter)
            prompt = Prompt(len(ids), ids, {})
            hooks.enter_context(worn(net, adapter, prompt) if own else adapter(net))
        found = read(net(torch.tensor([ids])))
    return found.float()


def _params(kind: Kind) -> Any:
    said = {"lora_ext": kind.says} if kind.says else None
    return greedy(1, prompt_logprobs=-1, logprobs=-1, extra_args=said)


def _rows(output: Any, shape: torch.Size) -> torch.Tensor:
    got = torch.full(shape, float("nan"))
    for i, row in enumerate([*output.prompt_logprobs[1:], *output.outputs[0].logprobs]):
        for token, entry in row.items():
            got[i, token] = entry.logprob
    return got


def _shapes(net: nn.Module, targets: Iterable[str], under: str = "") -> dict[str, tuple[int, int]]:
    """Name of a linear → (in, out)."""
    found = {
        name: (layer.in_features, layer.out_features) for name, layer in net.named_modules()
        if isinstance(layer, nn.Linear) and name.rsplit(".", 1)[-1] in set(targets)
        and name.startswith(under)
    }  # fmt: skip
    assert found
    return found


def _narrow(file: Path) -> None:
    """Drops the tensors of all layers but the first, and of queries, which have a gate beside them
    in some models."""
    other = re.compile(r"layers\.(\w\.)?[1-9]|\.wq_")
    save_file({n: t for n, t in load_file(file).items() if not other.search(n)}, file)


def _named(adapter: RoutedAdapter, net: nn.Module) -> RoutedAdapter:
    """By the names of a bare model, if this is one."""
    if hasattr(net, "model"):
        return adapter
    return replace(
        adapter, modules={n.removeprefix("model."): m for n, m in adapter.modules.items()}
    )


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
