"""X-LoRA folders: both layouts, the classifier's recorded gates, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from make_adapters import FIXTURES
from safetensors.torch import load_file, save_file

from vllm_lora_ext.adapters import load_adapter, write_native
from vllm_lora_ext.adapters.hf import apply_adapter
from vllm_lora_ext.adapters.registry import needs_two_passes
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.factors import load_factors
from vllm_lora_ext.merging.routed import concat_routed
from vllm_lora_ext.summary import summarise
from vllm_lora_ext.trace import record
from vllm_lora_ext.verify import engine_options, frozen_distance

ROOT = FIXTURES / "conditioned"
NAMES = sorted(path.name for path in ROOT.glob("xlora_*"))
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.internal_xlora_classifier.layers."
GATES = 1e-5


def fixture(name):
    meta = json.loads((ROOT / name / "meta.json").read_text())
    return meta, load_file(ROOT / name / "expected.safetensors")


@pytest.fixture
def folder(tmp_path):
    """A copy of a fixture to be changed; layerwise, two layers deep, four experts."""
    return shutil.copytree(ROOT / "xlora_lw-a" / "adapter", tmp_path / "adapter")


def mend(folder, **changes):
    file = folder / CONFIG
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))


def refusal(folder):
    with pytest.raises(AdapterError) as caught:
        load_adapter(folder)
    return caught.value


@torch.no_grad()
def logits(model, adapter, ids_T):
    with apply_adapter(model, adapter):
        return model(ids_T[None]).logits[0]


def test_there_are_four_fixtures():
    assert NAMES == ["xlora_flat-a", "xlora_lw-a", "xlora_lw_topk-a", "xlora_topk-a"]


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_the_recorded_gates_and_modules(name, bases):
    meta, expected = fixture(name)
    adapter = load_adapter(ROOT / name / "adapter")
    assert list(adapter.modules) == meta["modules"]
    assert adapter.rank == meta["total_rank"]
    assert all(list(m.gate.blocks) == meta["expert_ranks"] for m in adapter.modules.values())
    base = bases[meta["base"]]
    for i in range(len(meta["prompt_lens"])):
        hidden = base(expected[f"prompt_{i}"][None], output_hidden_states=True).hidden_states[-1]
        got = adapter.classifier.scalings(hidden[0])
        assert (got - expected[f"gates_{i}"]).abs().max() < GATES


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens(name, bases):
    meta, expected = fixture(name)
    adapter, model = load_adapter(ROOT / name / "adapter"), bases[meta["base"]]
    for i in range(len(meta["prompt_lens"])):
        ids_T = torch.cat([expected[f"prompt_{i}"], expected[f"greedy_{i}"]])
        best_T = logits(model, adapter, ids_T[:-1]).argmax(-1)
        assert best_T[-12:].tolist() == expected[f"greedy_{i}"].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_a_trace_holds_the_gates_that_act(name, bases):
    meta, expected = fixture(name)
    adapter = load_adapter(ROOT / name / "adapter")
    trace = record(bases[meta["base"]], adapter, expected["prompt_0"].tolist())
    scalings_TLE = expected["gates_0"]
    config = json.loads((ROOT / name / "adapter" / CONFIG).read_text())
    for number, module in enumerate(meta["modules"]):
        want_TE = scalings_TLE[:, number if config["layerwise_scalings"] else 0].clone()
        if config["top_k_lora"]:
            least = want_TE.topk(config["top_k_lora"], dim=-1).values[:, -1:]
            want_TE[want_TE < least] = 0
        if config["enable_softmax_topk"]:
            want_TE = want_TE.masked_fill(want_TE == 0, float("-inf")).softmax(-1)
        assert (trace.weights[module] - want_TE).abs().max() < GATES


def test_a_kv_cache_is_refused(bases):
    adapter, model = load_adapter(ROOT / "xlora_flat-a" / "adapter"), bases["base_qwen2"]
    ids = torch.tensor([[5, 6, 7]])
    with apply_adapter(model, adapter), torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        with pytest.raises(AdapterError, match="use_cache=False"):
            model(ids[:, -1:], past_key_values=cache)
        alone = model(ids).logits
        both = model(torch.cat([ids, ids.flip(1)])).logits
    torch.testing.assert_close(both[:1], alone, atol=1e-5, rtol=1e-5)


class TestFrozenGates:
    """Behind the prompt, the gates of its last token."""

    @staticmethod
    def freeze(folder):
        (folder / "routing.json").write_text('{"gates": "frozen"}')
        return load_adapter(folder)

    @pytest.mark.parametrize("name", NAMES)
    @torch.no_grad()
    def test_are_the_last_tokens(self, name, bases, tmp_path):
        meta, expected = fixture(name)
        folder = shutil.copytree(ROOT / name / "adapter", tmp_path / "adapter")
        exact, frozen, base = load_adapter(folder), self.freeze(folder), bases[meta["base"]]
        assert frozen.digest != exact.digest and frozen.classifier.frozen
        ids_T = torch.cat([expected["prompt_1"], expected["greedy_1"]])
        end = len(expected["prompt_1"])
        hidden = base(ids_T[None], output_hidden_states=True).hidden_states[-1][0]
        gates_TG = exact.classifier.gates_of(hidden)
        gates_TG[end:] = gates_TG[end - 1]
        with apply_adapter(base, replace(exact, classifier=None), gates_TG):
            want = base(ids_T[None]).logits[0]
        with apply_adapter(base, frozen, prompt_length=end):
            got = base(ids_T[None]).logits[0]
        torch.testing.assert_close(got, want)
        with pytest.raises(AdapterError, match="prompt_length"):
            apply_adapter(base, frozen)
        trace = record(base, frozen, expected["prompt_1"].tolist(), new_tokens=4)
        gates_TE = trace.weights[meta["modules"][0]]
        assert (gates_TE[end:] == gates_TE[end - 1]).all() and len(gates_TE) > end

    @pytest.mark.parametrize("name", NAMES)
    def test_are_an_approximation_whose_distance_is_told(self, name, bases):
        """docs/two_passes.md has these numbers (`pytest -s` prints them)."""
        meta, expected = fixture(name)
        prompts = [expected[f"prompt_{i}"].tolist() for i in range(len(meta["prompt_lens"]))]
        adapter = load_adapter(ROOT / name / "adapter")
        far = frozen_distance(bases[meta["base"]], adapter, prompts)
        print(f"| `{name}` | {far.effect:.2f} | {far.mean:.2f} | {far.largest:.2f} |"
              f" {100 * far.greedy:.0f} % of {far.positions} |")  # fmt: skip
        assert 0.05 < far.mean / far.effect < 2 and far.largest > 0.1

    def test_any_other_word_is_an_error(self, folder):
        (folder / "routing.json").write_text('{"gates": "cold"}')
        assert refusal(folder).code == "bad_value"
        (folder / "routing.json").write_text('{"gates": "exact"}')
        assert not load_adapter(folder).classifier.frozen

    def test_are_named_an_approximation(self, folder):
        assert "an approximation" in summarise(self.freeze(folder))["classifier"]


class TestSoftmaxAndSelection:
    """PEFT's own steps, in its own words, on random scalings."""

    @pytest.mark.parametrize("softmax", [True, False])
    @pytest.mark.parametrize("top_k", [None, 1, 2, 4])
    @pytest.mark.parametrize("again", [True, False])
    def test_as_peft_has_them(self, softmax, top_k, again, folder):
        mend(folder, enable_softmax=softmax, top_k_lora=top_k, enable_softmax_topk=again,
             softmax_temperature=0.3)  # fmt: skip
        classifier = load_adapter(folder).classifier
        hidden_TK = torch.randn(7, 96, generator=torch.Generator().manual_seed(1)) * 40
        x = classifier.scalings(hidden_TK)
        if top_k is not None:
            mask = torch.zeros_like(x, dtype=torch.bool)
            mask.scatter_(-1, torch.topk(x, k=top_k, dim=-1).indices, True)
            x = x * mask
        if again:
            there = x != 0
            x = torch.softmax(x.masked_fill(~there, float("-inf")), dim=-1).masked_fill(~there, 0)
        torch.testing.assert_close(classifier.gates_of(hidden_TK), x.flatten(1))

    def test_what_a_softmax_has_lost_stays_lost(self, folder):
        mend(folder, softmax_temperature=1e-4, top_k_lora=2, enable_softmax_topk=True)
        gates = load_adapter(folder).classifier.gates_of(torch.randn(5, 96) * 10)
        assert ((gates == 0) | (gates == 1)).all()


def original(folder, place, names=None, relu=True, **changes):
    """The same adapter in the authors' layout."""
    config = json.loads((folder / CONFIG).read_text())
    stored = load_file(folder / WEIGHTS)
    step, place = 3 if relu else 1, place
    place.mkdir()
    last = max(int(n.removeprefix(PREFIX).split(".")[0]) for n in stored)
    tensors = {}
    for name, tensor in stored.items():
        at, part = name.removeprefix(PREFIX).split(".")
        layer = "last" if int(at) == last else f"inner.{int(at) // 3 * step}"
        tensors[f"{layer}.{part}"] = tensor
    save_file(tensors, place / "xlora_classifier.safetensors")
    names = names or [f"adapter_{i + 1}" for i in range(len(config["adapters"]))]
    for i, name in enumerate(names):
        shutil.copytree(folder / str(i), place / name)
    for key in ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type",
                "peft_version", "revision", "task_type"):  # fmt: skip
        config.pop(key)
    config |= {
        "base_model_id": "base_qwen2", "adapters": names, "enable_relu_and_dropout": relu,
        "use_bias": True,
    }  # fmt: skip
    config = {k: v for k, v in (config | changes).items() if v != "gone"}
    (place / "xlora_config.json").write_text(json.dumps(config))
    return place


def same(a, b):
    assert list(a.modules) == list(b.modules)
    for name in a.modules:
        assert torch.equal(a.modules[name].a_RK, b.modules[name].a_RK)
        assert torch.equal(a.modules[name].b_NR, b.modules[name].b_NR)
    for x, y in zip(a.classifier.tensors, b.classifier.tensors, strict=True):
        assert torch.equal(x, y)


class TestTheAuthorsLayout:
    def test_is_the_same_adapter(self, folder, tmp_path):
        theirs = load_adapter(original(folder, tmp_path / "theirs"))
        same(theirs, load_adapter(folder))
        assert theirs.base_model == "base_qwen2" and theirs.classifier.relu

    def test_without_relu(self, folder, tmp_path):
        theirs = load_adapter(original(folder, tmp_path / "theirs", relu=False)).classifier
        ours = load_adapter(folder).classifier
        h = torch.randn(3, 96)
        want = h @ ours.weights[0].t() + ours.biases[0]
        want = (want @ ours.weights[1].t() + ours.biases[1]).unflatten(1, (-1, 4)).softmax(-1)
        torch.testing.assert_close(theirs.scalings(h), want)
        assert not theirs.relu

    def test_without_biases(self, folder, tmp_path):
        place = original(folder, tmp_path / "theirs", use_bias=False)
        file = place / "xlora_classifier.safetensors"
        assert refusal(place).code == "unexpected_tensor"
        save_file({n: t for n, t in load_file(file).items() if "weight" in n}, file)
        assert load_adapter(place).classifier.biases == (None, None)

    def test_the_experts_order_is_the_configs(self, folder, tmp_path):
        names = ["zeta", "alpha", "mid", "beta"]
        same(load_adapter(original(folder, tmp_path / "theirs", names)), load_adapter(folder))

    def test_without_a_list_it_is_that_of_the_names(self, folder, tmp_path):
        place = original(folder, tmp_path / "theirs", adapters="gone")
        same(load_adapter(place), load_adapter(folder))

    def test_or_must_be_said_where_names_have_two_orders(self, folder, tmp_path):
        names = ["adapter_2", "adapter_9", "adapter_10", "adapter_11"]
        place = original(folder, tmp_path / "theirs", names, adapters="gone")
        assert refusal(place).code == "missing_setting"
        (place / "routing.json").write_text(json.dumps({"adapters": names}))
        same(load_adapter(place), load_adapter(folder))

    def test_a_softmax_over_all_tokens_is_refused(self, folder, tmp_path):
        place = original(folder, tmp_path / "theirs", top_k_lora=2, enable_softmax_topk=True)
        error = refusal(place)
        assert error.code == "unsupported_feature" and "later ones" in error.text

    def test_a_lost_choice_of_relu_is_an_error(self, folder, tmp_path):
        place = original(folder, tmp_path / "theirs", enable_relu_and_dropout="gone")
        assert refusal(place).code == "missing_key"


class TestLayers:
    def test_an_expert_that_lacks_a_layer_adds_nothing_there(self, folder, bases):
        file = folder / "1" / WEIGHTS
        stored = load_file(file)
        save_file({n: t for n, t in stored.items() if ".1.mlp." not in n}, file)
        without = load_adapter(folder)
        zeroed = {n: torch.zeros_like(t) if ".1.mlp." in n else t for n, t in stored.items()}
        save_file(zeroed, file)
        ids = torch.arange(5, 25)
        want = logits(bases["base_qwen2"], load_adapter(folder), ids)
        got = logits(bases["base_qwen2"], without, ids)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)

    def test_unknown_names_need_an_order(self, folder):
        for file in sorted(folder.glob(f"[0-3]/{WEIGHTS}")):
            renamed = {n.replace("o_proj", "dense"): t for n, t in load_file(file).items()}
            save_file(renamed, file)
        error = refusal(folder)
        assert error.code == "missing_setting" and "dense" in error.text
        kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.dense", "mlp.up_proj")
        names = [f"model.layers.{n}.{kind}" for n in (0, 1) for kind in kinds]
        (folder / "routing.json").write_text(json.dumps({"layers": names}))
        assert list(load_adapter(folder).modules) == names
        (folder / "routing.json").write_text(json.dumps({"layers": names[1:]}))
        assert refusal(folder).code == "bad_value"

    def test_an_embedding_is_the_first_of_them(self, folder, bases):
        """Its gates come from a pass over the plain embedding."""
        file = folder / "2" / WEIGHTS
        random = torch.Generator().manual_seed(3)
        extra = {
            "base_model.model.model.embed_tokens.lora_embedding_A": torch.randn(
                3, 384, generator=random
            ),
            "base_model.model.model.embed_tokens.lora_embedding_B": torch.randn(
                96, 3, generator=random
            ),
        }
        save_file(load_file(file) | extra, file)
        names = sorted(load_file(folder / WEIGHTS))
        tensors = load_file(folder / WEIGHTS)
        tensors[names[2]] = torch.randn(36, generator=random)
        tensors[names[3]] = torch.randn(36, 20, generator=random)
        save_file(tensors, folder / WEIGHTS)
        adapter = load_adapter(folder)
        assert next(iter(adapter.modules)) == "model.embed_tokens"
        assert [m.row_start for m in adapter.modules.values()] == list(range(0, 36, 4))
        model, ids = bases["base_qwen2"], torch.arange(5, 25)
        assert (logits(model, adapter, ids) - model(ids[None]).logits[0]).abs().max() > 0.1


BROKEN = {
    "lost": (lambda f: drop(f, "0."), "missing_tensor"),
    "empty": (lambda f: drop(f, ""), "missing_tensor"),
    "bias": (lambda f: drop(f, "3.bias"), "missing_tensor"),
    "more": (lambda f: add(f, {f"{PREFIX}9.weight": torch.ones(2, 2)}), "unexpected_tensor"),
    "nan": (lambda f: add(f, {f"{PREFIX}0.bias": torch.full((20,), float("nan"))}), "not_finite"),
    "wide": (lambda f: add(f, {f"{PREFIX}0.weight": torch.ones(20, 95)}), "bad_shape"),
    "rows": (lambda f: add(f, {f"{PREFIX}3.weight": torch.ones(31, 20)}), "bad_shape"),
    "depth": (lambda f: mend(f, xlora_depth=3), "missing_tensor"),
    "shallow": (lambda f: mend(f, xlora_depth=1), "bad_shape"),
    "flat": (lambda f: mend(f, layerwise_scalings=False), "bad_shape"),
    "k": (lambda f: mend(f, top_k_lora=5), "k_too_large"),
    "no k": (lambda f: mend(f, top_k_lora=0), "bad_value"),
    "cold": (lambda f: mend(f, softmax_temperature=0), "bad_value"),
    "first pass": (lambda f: mend(f, scaling_pass_value=0.5), "unsupported_feature"),
    "unknown": (lambda f: mend(f, xlora_gate="gelu"), "unknown_key"),
    "layerwise": (lambda f: mend(f, layerwise_scalings="gone"), "missing_key"),
    "experts": (lambda f: mend(f, adapters={"a": "x", "b": "y"}), "bad_value"),
    "fewer": (lambda f: mend(f, adapters={"0": "x", "1": "y"}), "setting_mismatch"),
    "gone": (lambda f: shutil.rmtree(f / "3"), "missing_file"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "missing_file"),
}


def drop(folder, start):
    tensors = load_file(folder / WEIGHTS)
    save_file(
        {n: t for n, t in tensors.items() if not n.startswith(PREFIX + start)}, folder / WEIGHTS
    )


def add(folder, more):
    save_file(load_file(folder / WEIGHTS) | more, folder / WEIGHTS)


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_broken_folders(name, folder):
    build, code = BROKEN[name]
    build(folder)
    error = refusal(folder)
    assert error.code == code, error.text
    if name in ("lost", "empty"):
        assert "PEFT drops" in error.text


def test_what_else_is_done_to_adapters(folder, tmp_path):
    adapter = load_adapter(folder)
    for refused in (
        lambda: load_factors(folder),
        lambda: write_native(adapter, tmp_path / "native"),
        lambda: concat_routed([adapter] * 2),
    ):
        with pytest.raises(AdapterError) as caught:
            refused()
        assert caught.value.code == "unsupported_feature"


def test_who_needs_two_passes(folder, tmp_path):
    assert needs_two_passes(folder)
    assert not needs_two_passes(folder / "0")
    assert not needs_two_passes(tmp_path / "nothing")


def test_what_an_operator_is_told(folder):
    adapter = load_adapter(folder)
    summary = summarise(adapter)
    assert summary["classifier"] == "96 → 20 → 32, ReLU, softmax / 1; two passes"
    assert summary["fields"] == {"adapters": "its name, alone"}
    options = engine_options("base_qwen2", adapter, "float32", 384, 20)
    assert options["additional_config"] == {"lora_ext": {"two_pass": True, "max_gates": 32}}
    flat = load_adapter(ROOT / "xlora_topk-a" / "adapter")
    text = summarise(flat)["classifier"]
    assert text == "128 → 24 → 24 → 3, ReLU, softmax / 0.5, top 2; two passes"
