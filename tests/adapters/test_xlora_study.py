"""X-LoRA: what gates without a first pass cost (docs/systems/xlora_study.md has the table).

PEFT runs the exact system. The formula with gates given from outside is then run with the gates
that a server could have cheaply, and both are compared on the tokens after the prompt.
`pytest -s` prints the table.
"""

from __future__ import annotations

import contextlib
import copy
import math

import pytest
import torch
from make_multi import write_plain
from peft import XLoraConfig, get_peft_model
from safetensors.torch import load_file

from vllm_lora_ext.adapters import load_adapter
from vllm_lora_ext.errors import AdapterError

EXPERTS, PROMPT, TOKENS = 4, 24, 64
TARGETS = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
SHARPNESS = (0.5, 2.0, 8.0)  # standard deviation of the classifier's logits, about
SEEDS = range(4)


def experts(folder):
    return [load_adapter(write_plain(folder / str(e), e, r=4, alpha=8, targets=TARGETS))
            for e in range(EXPERTS)]  # fmt: skip


def peft_model(folder, base, sharpness, seed, layerwise=False, depth=1):
    base = copy.deepcopy(base)
    base.config.use_cache = False
    config = XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=base.config.hidden_size, xlora_depth=depth,
        layerwise_scalings=layerwise, adapters={str(e): str(folder / str(e))
                                                for e in range(EXPERTS)},
    )  # fmt: skip
    model = get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(seed)
    for layer in model.base_model.internal_xlora_classifier.layers:
        if isinstance(layer, torch.nn.Linear):
            spread = sharpness / math.sqrt(layer.in_features)
            layer.weight.data = torch.randn(layer.weight.shape, generator=generator) * spread
            layer.bias.data.zero_()
    return model


@contextlib.contextmanager
def gated(model, adapters, gates_TE):
    """y = W x + sum_e g_e s_e B_e A_e x in every adapted linear, g given."""

    def add(name):
        def hook(_, args, output):
            x_TK = args[0][0]
            deltas = [x_TK @ a.modules[name].a_RK.T @ a.modules[name].b_NR.T for a in adapters]
            stacked = torch.stack(deltas, dim=1)  # [T, E, out]
            return output + torch.einsum("te,ten->tn", gates_TE, stacked)[None]

        return hook

    handles = [model.get_submodule(n).register_forward_hook(add(n)) for n in adapters[0].modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def stand_ins(gates_TE, other_TE):
    """Gates that need no second forward for generated tokens (the last one is a bound)."""
    end, mean = gates_TE[PROMPT - 1], gates_TE[:PROMPT].mean(0)
    after = gates_TE.shape[0] - PROMPT
    return {
        "frozen at the end of the prompt": torch.cat([gates_TE[:PROMPT], end.repeat(after, 1)]),
        "mean of the prompt's": torch.cat([gates_TE[:PROMPT], mean.repeat(after, 1)]),
        "mean over other text": other_TE.mean(0).repeat(len(gates_TE), 1),
        "uniform": torch.full_like(gates_TE, 1 / EXPERTS),
        "the token before's": torch.cat([gates_TE[:PROMPT], gates_TE[PROMPT - 1 : -1]]),
    }


def ids(seed):
    return torch.randint(4, 500, (1, TOKENS), generator=torch.Generator().manual_seed(seed))


def gates_of(model):
    return model.base_model.internal_xlora_scalings[0, :, 0]  # one for all layers


def measure(folder, base, adapters, sharpness):
    """Stand-in → (mean and max |dlogit|, both over the adapter's mean effect; equal argmax)."""
    found = {}
    for seed in SEEDS:
        model = peft_model(folder, base, sharpness, seed)
        model(ids(100 + seed))
        other_TE = gates_of(model)
        want = model(ids(seed)).logits[0]
        gates_TE = gates_of(model)
        plain = base(ids(seed)).logits[0]
        effect = (want - plain)[PROMPT:].abs().mean().item()
        candidates = {"exact": gates_TE, **stand_ins(gates_TE, other_TE)}
        for name, stand_TE in candidates.items():
            with gated(base, adapters, stand_TE):
                got = base(ids(seed)).logits[0]
            error = (got - want)[PROMPT:].abs()
            same = (got.argmax(-1) == want.argmax(-1))[PROMPT:].float().mean()
            row = torch.tensor([error.mean() / effect, error.max() / effect, same, effect])
            found.setdefault(name, []).append(row)
    return {name: torch.stack(rows).mean(0).tolist() for name, rows in found.items()}


@pytest.mark.filterwarnings("ignore")
def test_the_cheap_stand_ins_are_not_near(bases, tmp_path):
    adapters = experts(tmp_path)
    tables = {s: measure(tmp_path, bases["base_llama"], adapters, s) for s in SHARPNESS}
    for sharpness, table in tables.items():
        for name, (mean, largest, same, effect) in table.items():
            print(f"logits' spread {sharpness}: {name:32} mean {mean:.1e} max {largest:.1e} of the"
                  f" adapter's effect {effect:.2f}; {100 * same:.0f} % equal argmax")  # fmt: skip
    for table in tables.values():
        assert table["exact"][1] < 1e-3  # the formula is PEFT's
        assert table["exact"][3] > 0.2
    for sharpness in (2.0, 8.0):  # a classifier that chooses
        for name in ("frozen at the end of the prompt", "mean of the prompt's", "uniform",
                     "mean over other text", "the token before's"):  # fmt: skip
            mean, largest, same, _ = tables[sharpness][name]
            assert mean > 0.2, (sharpness, name)
            assert largest > 1.0
            assert same < 0.95
    flat = tables[0.5]["uniform"][0]
    assert flat < tables[2.0]["uniform"][0] < tables[8.0]["uniform"][0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layerwise", [False, True])
def test_old_tokens_gates_never_change(layerwise, bases, tmp_path):
    """So two KV caches, base and adapted, are exact."""
    experts(tmp_path)
    model = peft_model(tmp_path, bases["base_llama"], 2.0, 0, layerwise)
    whole = model(ids(0)).logits[0]
    gates = model.base_model.internal_xlora_scalings[0].clone()
    start = model(ids(0)[:, :PROMPT]).logits[0]
    assert (gates[:PROMPT] - model.base_model.internal_xlora_scalings[0]).abs().max() < 1e-5
    assert (whole[:PROMPT] - start).abs().max() < 1e-4
    assert (gates[PROMPT:] - gates[PROMPT - 1]).abs().max() > 0.3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("depth", "kept"), [(1, []), (2, []), (3, [6])])
def test_what_peft_saves_is_incomplete_and_refused(depth, kept, bases, tmp_path):
    experts(tmp_path / "in")
    peft_model(tmp_path / "in", bases["base_llama"], 2.0, 0, depth=depth).save_pretrained(
        tmp_path / "out"
    )
    stored = load_file(tmp_path / "out/adapter_model.safetensors")
    # Layers stand at 0, 3, 6; those whose number is also an expert's name are lost.
    assert sorted(int(n.split(".")[-2]) for n in stored if n.endswith(".weight")) == kept
    with pytest.raises(AdapterError, match=r"PEFT drops those of its layers") as caught:
        load_adapter(tmp_path / "out")
    assert caught.value.code == "missing_tensor"
