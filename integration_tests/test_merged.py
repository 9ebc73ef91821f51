"""Merged, converted and generated adapters in a running engine.

The judge is transformers with the dense delta added to the weights: the delta that the system's
own code gave for the fixture, so that neither our merge nor our kernels can hide behind the other.
"""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from integration_tests.engines import FIXTURES, close, lora, make_engine, prompt_logprobs, worst
from tests.merging.run_case import merge_case, run_case
from tests.merging.run_variant import handles, run_variant
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging import Factors, Pair, Term, load_factors, merge, save_peft
from vllm_lora_ext.merging.generate import ExpertLibrary, fuse
from vllm_lora_ext.merging.variants import read_variant

pytestmark = pytest.mark.engine

BOUND = 2e-3
CASES = FIXTURES / "merged"
INPUTS = CASES / "inputs"
BASE, VOCAB = INPUTS / "base", 128
PROMPTS = [torch.randint(4, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist()
           for n in (9, 30)]  # fmt: skip

Deltas = dict[str, torch.Tensor]


@cache
def read(name: str) -> dict[str, Any]:
    return json.loads((CASES / name / "case.json").read_text())


NAMES = sorted(folder.name for folder in CASES.iterdir() if (folder / "case.json").is_file())
FULL_RANK = [name for name in NAMES if not read(name)["exact"]]
MULTIPLIERS = [name for name in NAMES if read(name)["kind"] == "output"]


@pytest.fixture(scope="module")
def llm():
    engine = make_engine(
        BASE, hf_overrides={"architectures": ["LlamaForCausalLM"]}, enforce_eager=True,
        max_loras=4, max_lora_rank=64, max_model_len=64, max_num_seqs=16,
    )  # fmt: skip
    yield engine
    close(engine)


@pytest.fixture(scope="module")
def logits():
    """Logits [T, V] of the base with dense deltas added to its weights."""
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    plain = {name: weight.detach().clone() for name, weight in net.state_dict().items()}

    def run(deltas: Deltas, prompt: list[int]) -> torch.Tensor:
        changed = {f"{name}.weight": plain[f"{name}.weight"] + d for name, d in deltas.items()}
        net.load_state_dict(plain | changed)
        with torch.inference_mode():
            return net(torch.tensor([prompt])).logits[0]

    return run


def expected(name: str) -> Deltas:
    """What the system's own code gave: the dense delta of every layer, as it is served."""
    stored = load_file(CASES / name / "expected.safetensors")
    return {module: stored[module] for module in read(name)["numerical_rank"]}


def dense(factors: Factors) -> Deltas:
    return {module: pair.delta() for module, pair in factors.modules.items()}


def check(llm, logits, folder, deltas: Deltas) -> None:
    """Every log-probability of both prompts, with a row of the base model in the batch."""
    adapter = lora(folder.name, folder)
    wanted = [logits(deltas, prompt) for prompt in PROMPTS] + [logits({}, PROMPTS[0])]
    effect = float((wanted[0] - wanted[2]).abs().max())
    # A bound that an adapter of a small effect would meet without being served checks nothing.
    bound = min(BOUND, effect / 20)
    assert bound > BOUND / 20
    requests = [*((prompt, adapter) for prompt in PROMPTS), (PROMPTS[0], None)]
    got = prompt_logprobs(llm, requests, VOCAB)
    diffs = [worst(g, w) for g, w in zip(got, wanted, strict=True)]
    print(f"{folder.name}: max |dlogp| {max(diffs[:2]):.1e}, base {diffs[2]:.1e}, "
          f"the adapter moves a logit by up to {effect:.2f}")  # fmt: skip
    assert max(diffs) < bound


def test_every_fixture_is_here():
    assert len(NAMES) >= 56
    assert len(FULL_RANK) >= 9 and MULTIPLIERS == ["dora", "ia3"]


@pytest.mark.parametrize("name", NAMES)
def test_case_is_served_with_the_tool_s_delta(name, llm, logits, tmp_path):
    """Full-rank results at rank 64, which on these shapes holds them whole."""
    check(llm, logits, save_peft(run_case(CASES / name), tmp_path / name), expected(name))


@pytest.mark.parametrize("name", FULL_RANK)
def test_full_rank_result_cut_to_a_lower_rank(name, llm, logits, tmp_path):
    """The cut is the best of its rank (the cases' own rule), and the engine serves that cut."""
    case, rank = read(name), read(name)["min_rank"]
    if handles(case):
        factors = run_variant(CASES / name, case, rank=rank).converted.factors
    else:
        factors = merge_case(CASES / name, case, rank=rank).factors
    for module, wanted in expected(name).items():
        sigma = torch.linalg.svdvals(wanted.double())
        best = float(sigma[rank:].norm() / sigma.norm())
        error = float((factors.modules[module].delta() - wanted).norm() / wanted.norm())
        assert error <= best * (1 + 1e-4) + case["tolerance"]
    assert factors.rank == rank
    check(llm, logits, save_peft(factors, tmp_path / f"{name}-{rank}"), dense(factors))


@pytest.mark.parametrize("name", MULTIPLIERS)
def test_a_multiplier_is_never_dropped_in_silence(name):
    """DoRA and IA3 are no LoRA: refused as such, a rank must be asked for, its error is told."""
    adapter = CASES / name / "input" / "adapter"
    with pytest.raises(AdapterError):
        load_factors(adapter)
    with pytest.raises(AdapterError) as refused:
        read_variant(adapter, base=BASE)
    assert refused.value.code == "missing_setting"
    cut = read_variant(adapter, base=BASE, rank=16)
    assert not cut.exact and min(cut.error.values()) > 0.1
    exact = read_variant(adapter, base=BASE, multipliers=True)
    assert exact.out_scale or exact.in_scale


def test_all_cases_at_once_over_four_slots(llm, logits, tmp_path):
    """More adapters than slots and than the host cache holds, each asked twice, in random order."""
    folders = {name: save_peft(run_case(CASES / name), tmp_path / name) for name in NAMES}
    order = [name for name in NAMES for _ in range(2)]
    random.Random(0).shuffle(order)
    requests = [(PROMPTS[0], lora(f"{name}-mixed", folders[name])) for name in order]
    got = prompt_logprobs(llm, requests, VOCAB)
    wanted = {name: logits(expected(name), PROMPTS[0]) for name in NAMES}
    diffs = {name: worst(g, wanted[name]) for name, g in zip(order, got, strict=True)}
    print(f"{len(order)} requests for {len(NAMES)} adapters: max |dlogp| {max(diffs.values()):.1e}")
    assert max(diffs.values()) < BOUND, diffs


def weighted(**weights: float) -> Deltas:
    """sum w D over input adapters, added up densely."""
    found: Deltas = {}
    for name, weight in weights.items():
        for module, delta in dense(load_factors(INPUTS / name)).items():
            found[module] = found.get(module, 0) + weight * delta
    return found


def terms(**weights: float) -> list[Term]:
    return [Term(load_factors(INPUTS / name), weight) for name, weight in weights.items()]


def lego_whole() -> tuple[Factors, Deltas]:
    """LoRA-LEGO with a cluster for every rank is the sum."""
    merged = merge("lego", terms(math=0.8, code=-0.5), {"k": 12})
    return merged.factors, weighted(math=0.8, code=-0.5)


def lego() -> tuple[Factors, Deltas]:
    factors = merge("lego", terms(math=1.0, code=1.0, rp=1.0), {"k": 5}).factors
    assert factors.rank == 5
    return factors, dense(factors)


def icm_fusion() -> tuple[Factors, Deltas]:
    pool = [load_factors(INPUTS / name) for name in ("eq1", "eq2", "eq3")]
    factors = fuse(pool, [0.5, 0.3, 0.2]).factors
    return factors, dense(factors)


def sg_lora() -> tuple[Factors, Deltas]:
    """A description's mixture of experts, by the softmax of its similarities."""
    spoken = {"sums": [1.0, 0.2, 0.0], "programs": [0.0, 1.0, 0.3], "tone": [0.2, 0.0, 1.0],
              "sums in programs": [0.9, 0.8, 0.0]}  # fmt: skip
    embed = {text: torch.tensor(vector) for text, vector in spoken.items()}.__getitem__
    described = {"math": ("math", "sums"), "code": ("code", "programs"), "style": ("style", "tone")}
    library = ExpertLibrary.build(described, embed, root=INPUTS)
    weights = library.select(embed("sums in programs"), k=2, temperature=0.5)
    assert set(weights) == {"math", "code"}
    factors = library.generate("sums in programs", embed, k=2, temperature=0.5)
    return factors, weighted(**weights)


def selected_layers() -> tuple[Factors, Deltas]:
    """LayRA, Flexora: the layers that stay keep their delta, the others have none."""
    factors = merge("select_layers", terms(math=1.0), {"include": [1]}).factors
    kept = {module: d for module, d in weighted(math=1.0).items() if ".layers.1." in module}
    return factors, kept


def rank_stabilised() -> tuple[Factors, Deltas]:
    """LoRA-Pro's artefact: a plain LoRA, its scale alpha / sqrt(r)."""
    stored = load_file(INPUTS / "style" / "adapter_model.safetensors")
    by_name = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): name
        for name in stored
        if name.endswith(".lora_A.weight")
    }
    deltas = {
        module: 16 / 8**0.5 * stored[name.replace("lora_A", "lora_B")] @ stored[name]
        for module, name in by_name.items()
    }
    factors = load_factors(INPUTS / "style")
    return Factors({m: Pair(*pair) for m, pair in factors.modules.items()}), deltas


MADE = [lego_whole, lego, icm_fusion, sg_lora, selected_layers, rank_stabilised]


@pytest.mark.parametrize("make", MADE, ids=lambda make: make.__name__)
def test_what_has_no_recorded_numbers(make, llm, logits, tmp_path):
    """Methods without public code, against their definition where it fixes the delta."""
    factors, deltas = make()
    check(llm, logits, save_peft(factors, tmp_path / make.__name__), deltas)
