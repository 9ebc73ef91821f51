"""Recipes: what is written down is what is merged, and every mistake has its name."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging import Factors, Pair, Term, load_factors, merge, save_peft
from vllm_lora_ext.merging.recipes import (
    LOCK,
    parse_recipe,
    read_recipe,
    run_recipe,
    write_recipe,
)

NAMES = [
    f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn.q_proj", "mlp.up_proj")
]


def factors(seed, rank=4, base="org/base"):
    draw = torch.Generator().manual_seed(seed)
    modules = {
        n: Pair(torch.randn(rank, 12, generator=draw), torch.randn(10, rank, generator=draw))
        for n in NAMES
    }
    return Factors(modules, base)


@pytest.fixture
def home(tmp_path):
    for seed, name in enumerate(("math", "code")):
        save_peft(factors(seed, 4 + seed), tmp_path / name)
    return tmp_path


def model(name, weight=1.0, **own):
    return {"model": name, "parameters": {"weight": weight, **own}}


def recipe(method="cat", *models, **more):
    models = models or (model("math", 0.6), model("code", -0.4))
    return {"version": 1, "merge_method": method, "models": list(models), **more}


def run(home, mapping, **how):
    return run_recipe(parse_recipe(mapping), lambda name: home / name, **how)


def delta(merged, name):
    return merged.factors.modules[name].delta()


def assert_same(one, other):
    assert set(one.factors.modules) == set(other.factors.modules)
    for name in one.factors.modules:
        torch.testing.assert_close(delta(one, name), delta(other, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "method, parameters",
    [("cat", {}), ("svd", {"rank": 3}), ("ties", {"density": 0.3}), ("dare_ties", {"seed": 7}),
     ("lego", {"k": 3}), ("linear", {"lambda": 2.0}), ("tsv", {})],
)  # fmt: skip
def test_a_recipe_is_the_merge(home, method, parameters):
    terms = [
        Term(load_factors(home / "math"), 0.6, "math"),
        Term(load_factors(home / "code"), -0.4, "code"),
    ]
    wanted = merge(method, terms, parameters)
    assert_same(run(home, recipe(method, parameters=parameters)), wanted)


def test_gradients_and_filters(home):
    weight = [{"filter": "mlp", "value": 0.5}, {"value": [0.0, 1.0, 2.0]}]
    merged = run(home, recipe("cat", model("math", weight)))
    alone = load_factors(home / "math").modules
    for name in NAMES:
        layer = int(name.split(".")[2])
        wanted = alone[name].delta() * (0.5 if "mlp" in name else layer)
        got = merged.factors.modules.get(name)
        got = torch.zeros_like(wanted) if got is None else got.delta()
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_own_density(home):
    own = run(home, recipe("ties", model("math", density=0.5), model("code", density=0.5)))
    assert_same(
        own, run(home, recipe("ties", model("math"), model("code"), parameters={"density": 0.5}))
    )


def test_a_pipeline(home):
    steps = [
        {"id": "a", "op": "load", "model": "math"},
        {"id": "b", "op": "load", "model": "code"},
        {"id": "half", "op": "scale", "input": "b", "weight": 0.5},
        {"id": "low", "op": "select_layers", "input": "a", "include": [0, 1]},
        {"id": "sum", "op": "concat", "inputs": {"low": 2.0, "half": -1.0}},
        {"id": "out", "op": "truncate", "input": "sum", "rank": 9},
    ]
    merged = run(home, {"version": 1, "merge_method": "pipeline", "steps": steps})
    a, b = load_factors(home / "math").modules, load_factors(home / "code").modules
    for name in NAMES:
        wanted = -0.5 * b[name].delta()
        if ".2." not in name:
            wanted = wanted + 2 * a[name].delta()
        torch.testing.assert_close(delta(merged, name), wanted, rtol=1e-4, atol=1e-4)


def test_a_pipeline_merges_and_says_what_it_lost(home):
    steps = [
        {"id": "a", "op": "load", "model": "math"},
        {"id": "b", "op": "convert", "model": "code"},
        {"id": "cut", "op": "truncate", "input": "a", "rank": 2},
        {"id": "out", "op": "merge", "method": "cat", "inputs": ["cut", "b"]},
    ]
    merged = run(home, {"version": 1, "merge_method": "pipeline", "steps": steps})
    assert merged.factors.rank == 7
    assert not merged.report.exact
    cut = merge("svd", [Term(load_factors(home / "math"))], {"rank": 2})
    assert merged.report.kept_energy == pytest.approx(cut.report.kept_energy, abs=1e-6)


def test_an_error_of_a_step_names_it(home):
    steps = [{"id": "a", "op": "load", "model": "nowhere"}]
    with pytest.raises(AdapterError, match="step 'a'") as error:
        run(home, {"version": 1, "merge_method": "pipeline", "steps": steps})
    assert error.value.code == "not_found"


def test_rank_too_large_is_cut_only_where_the_recipe_says_so(home):
    with pytest.raises(AdapterError) as error:
        run(home, recipe(), max_rank=5)
    assert error.value.code == "rank_too_large"
    cut = run(home, recipe(output={"on_overflow": "truncate"}), max_rank=5)
    assert cut.factors.rank == 5 and "cut from rank 9 to 5" in cut.report.warnings[-1]
    assert_same(cut, run(home, recipe("svd", parameters={"rank": 5})))
    assert run(home, recipe(output={"rank": 6})).factors.rank == 6
    with pytest.raises(AdapterError) as error:
        run(home, recipe(output={"rank": 6, "on_overflow": "error"}))
    assert error.value.code == "rank_too_large"


def test_another_base_model(home):
    assert run(home, recipe(base_model="/copies/base")).factors.base_model == "/copies/base"
    with pytest.raises(AdapterError) as error:
        run(home, recipe(base_model="org/other"))
    assert error.value.code == "setting_mismatch"


def test_learned_weights(home):
    for i, scalar in enumerate((0.3, -0.7)):
        folder = home / "run" / f"adapter_{i}"
        save_peft(factors(i), folder)
        tensors = load_file(folder / "adapter_model.safetensors")
        for name in NAMES:
            tensors[f"base_model.model.{name}.lora_learnable_weights"] = torch.tensor([scalar])
        save_file(tensors, folder / "adapter_model.safetensors")
    learned = {"from": "run", "kind": "lora_soups_softmax"}
    merged = run(
        home, recipe("soups", model("run/adapter_0", learned), model("run/adapter_1", learned))
    )
    p = torch.softmax(torch.tensor([0.3, -0.7]), 0)
    for name in NAMES:
        wanted = sum(p[i] * factors(i).modules[name].delta() for i in range(2))
        torch.testing.assert_close(delta(merged, name), wanted, rtol=1e-5, atol=1e-5)


def test_cancelled(home):
    with pytest.raises(AdapterError) as error:
        run(home, recipe(), cancel=lambda: True)
    assert error.value.code == "cancelled"


STEP = {"id": "a", "op": "load", "model": "math"}
WRONG = [
    ({**recipe(), "extra": 1}, "unknown_key", "extra"),
    (recipe("cat", {"model": "math", "weigth": 1}), "unknown_key", r"models\[0\].weigth"),
    (recipe("cat", {"parameters": {}}), "missing_key", r"models\[0\].model"),
    (recipe("cat", model("math", "much")), "bad_value", "weight"),
    (recipe("cat", model("math", float("nan"))), "bad_value", "weight"),
    (recipe("cat", model("math", True)), "bad_value", "weight"),
    (recipe("tie"), "bad_value", "merge_method"),
    (recipe(parameters={"densty": 0.5}), "unknown_key", "'parameters' has no parameter 'densty'"),
    (recipe("ties", parameters={"density": 2}), "bad_value", "density"),
    (recipe("cat", model("math", density=0.5)), "unknown_key", "density"),
    (recipe(output={"rank": 0}), "bad_value", "output.rank"),
    (recipe(output={"energy": 1.5}), "bad_value", "output.energy"),
    (recipe(dtype="float64"), "bad_value", "dtype"),
    (recipe(dtype="float16", output={"dtype": "bfloat16"}), "setting_mismatch", "dtype"),
    (recipe(steps=[STEP]), "unknown_key", "steps"),
    ({"version": 1, "merge_method": "cat"}, "missing_key", "models"),
    ({**recipe(), "version": 2}, "bad_value", "version"),
    ({"version": 1, "merge_method": "pipeline"}, "missing_key", "steps"),
    ({"version": 1, "merge_method": "pipeline", "steps": [{"id": "a"}]}, "missing_key", "op"),
    ({"version": 1, "merge_method": "pipeline", "steps": [STEP, STEP]}, "bad_value", "twice"),
    (
        {"version": 1, "merge_method": "pipeline",
         "steps": [{"id": "s", "op": "scale", "input": "x", "weight": 1}]},
        "bad_value", "before",
    ),
    (
        {"version": 1, "merge_method": "pipeline", "steps": [STEP, {**STEP, "id": "b"}]},
        "bad_value", "one result",
    ),
    (
        {"version": 1, "merge_method": "pipeline",
         "steps": [STEP, {"id": "t", "op": "truncate", "input": "a"}]},
        "missing_key", "rank nor energy",
    ),
    ([1, 2], "bad_value", "mapping"),
]  # fmt: skip


@pytest.mark.parametrize("mapping, code, text", WRONG)
def test_a_wrong_recipe(mapping, code, text):
    with pytest.raises(AdapterError, match=text) as error:
        parse_recipe(mapping)
    assert error.value.code == code


@pytest.mark.parametrize(
    "text, code",
    [("version: 1\nversion: 1\n", "bad_yaml"), ("a: &x [1]\nb: *x\n", "bad_yaml"),
     ("a: [1\n", "bad_yaml"), ("--- {}\n--- {}\n", "bad_yaml"),
     ("!!python/object/apply:os.getcwd []\n", "bad_yaml"), ("", "bad_value"),
     ("#" * (1 << 20) + "##", "too_large")],
)  # fmt: skip
def test_a_wrong_file(tmp_path, text, code):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(AdapterError) as error:
        read_recipe(path)
    assert error.value.code == code


def test_no_file(tmp_path):
    with pytest.raises(AdapterError) as error:
        read_recipe(tmp_path / "none.yaml")
    assert error.value.code == "not_found"


def test_a_file_is_read_and_its_dump_is_the_same_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    mapping = recipe(
        "ties", model("math", [{"filter": "mlp", "value": 1e-3}, {"value": [0.1, 0.2]}]),
        model("code", {"from": "run", "kind": "lora_soups_softmax"}), parameters={"svd_rank": 4},
    )  # fmt: skip
    path.write_text(yaml.safe_dump(mapping))
    found = read_recipe(path)
    assert found.inputs() == ["math", "code", "run"]
    assert found.parameters == {"rank": 4}
    assert parse_recipe(json.loads(json.dumps(found.model_dump(mode="json")))) == found


def test_the_folder_says_what_it_is_made_of(home):
    found = parse_recipe(recipe(output={"dtype": "bfloat16"}))
    built = write_recipe(found, lambda name: home / name, home / "out")
    lock = json.loads((built.path / LOCK).read_text())
    assert parse_recipe(lock["recipe"]) == found
    assert set(lock["inputs"]) == {"math", "code"}
    assert set(lock["inputs"]["math"]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert lock["rank"] == built.rank == 9 and lock["report"]["exact"]
    tensors = load_file(built.path / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    again = run_recipe(found, lambda name: home / name)
    for name, pair in load_factors(built.path).modules.items():
        torch.testing.assert_close(pair.delta(), delta(again, name), rtol=0.05, atol=0.1)


def _documented():
    text = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    return re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("text", _documented(), ids=range(len(_documented())))
def test_the_documented_recipes(text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert read_recipe(path).inputs()
