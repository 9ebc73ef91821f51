"""`bundle` as a user runs it: against sums over experts written out, and against the readers."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from make_adapters import BASE_LLAMA, FIXTURES, normal
from make_multi import SOME, write_arrow, write_lora_mixer, write_plain
from make_routed import linears, write_moram
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from vllm_lora_ext import bundle as bundle_module
from vllm_lora_ext import convert as convert_module
from vllm_lora_ext.adapters import load_adapter
from vllm_lora_ext.adapters.hf import apply_adapter, delta_reference
from vllm_lora_ext.bundle import Uniform, bundle, lacking, read_expert, read_router, write_bundle
from vllm_lora_ext.cli import app
from vllm_lora_ext.convert import RECORD, differing
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging import Term, load_factors, merge
from vllm_lora_ext.merging.routed import concat_routed

EXAMPLES = Path(__file__).parent.parent / "examples" / "adapters"
PREFIX = "base_model.model."
IDS = torch.randint(4, 380, (2, 24), generator=torch.Generator().manual_seed(0))


def with_tensors(folder: Path, change: Any) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def with_config(folder: Path, **changed: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def run(*arguments: object) -> tuple[int, Any]:
    done = CliRunner().invoke(app, ["bundle", *map(str, arguments), "--json"])
    assert done.exit_code in (0, 1), done.output
    return done.exit_code, json.loads(done.stdout)


def refused(*arguments: object) -> str:
    code, found = run(*arguments)
    assert code == 1 and not found["ok"]
    return found["error"]["code"]


def usage_error(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["bundle", *map(str, arguments)])
    assert done.exit_code == 2, done.output
    return " ".join(done.output.replace("│", " ").split())


def named(folders: dict[str, Path]) -> list[str]:
    return [word for n, folder in folders.items() for word in ("--adapter", f"{n}={folder}")]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE_LLAMA, dtype=torch.float32).eval()


@pytest.fixture
def experts(tmp_path: Path) -> dict[str, Path]:
    """Three of different ranks and scales, one of them rsLoRA, one with ranks of its own."""
    folders = {
        "math": write_plain(tmp_path / "in/math", 1, r=3, alpha=4),
        "code": write_plain(tmp_path / "in/code", 2, r=5, alpha=7, use_rslora=True),
        "text": write_plain(tmp_path / "in/text", 3, r=2, alpha=-2.5),
    }

    def double(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if "q_proj" in n]:
            tensors[name] = torch.cat([tensors[name]] * 2, dim=int("lora_B" in name))

    with_tensors(folders["text"], double)
    with_config(folders["text"], rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 6})
    return folders


def write_routers(file: Path, experts: int, seed: int = 0, bias: bool = False) -> Path:
    rng, tensors = np.random.default_rng(seed), {}
    for name, (width, _) in linears("base_llama", SOME).items():
        tensors[f"{PREFIX}{name}.router.weight"] = normal(rng, experts, width) * 0.2
        if bias:
            tensors[f"{PREFIX}{name}.router.bias"] = normal(rng, experts) * 0.1
    file.parent.mkdir(exist_ok=True)
    save_file(tensors, file)
    return file


def logits(model: Any, adapter: Any) -> torch.Tensor:
    with torch.no_grad(), apply_adapter(model, adapter):
        return model(IDS).logits


def by_hand(model: Any, folders: dict[str, Path], file: Path, weigh: Any) -> torch.Tensor:
    """The model with sum_e weigh(R x)_e · s_e B_e A_e x, from the files' raw tensors."""
    routers, handles = load_file(file), []
    files = [load_file(f / "adapter_model.safetensors") for f in folders.values()]
    configs = [json.loads((f / "adapter_config.json").read_text()) for f in folders.values()]

    def hook(name: str) -> Any:
        def add(_: Any, args: Any, y: torch.Tensor) -> torch.Tensor:
            (x,) = args
            v = weigh(x @ routers[f"{PREFIX}{name}.router.weight"].T, name)
            for e, (tensors, config) in enumerate(zip(files, configs, strict=True)):
                a, b = (tensors[f"{PREFIX}{name}.lora_{p}.weight"] for p in "AB")
                tail = name.rsplit(".", 1)[1]
                alpha = config["alpha_pattern"].get(tail, config["lora_alpha"])
                rank = len(a)
                scale = alpha / (rank**0.5 if config["use_rslora"] else rank)
                y = y + v[..., e : e + 1] * scale * (x @ a.T @ b.T)
            return y

        return add

    for name in linears("base_llama", SOME):
        handles.append(model.get_submodule(name).register_forward_hook(hook(name)))
    with torch.no_grad():
        found = model(IDS).logits
    for handle in handles:
        handle.remove()
    return found


def close(got: torch.Tensor, want: torch.Tensor, without: torch.Tensor) -> None:
    assert (want - without).abs().mean() > 0.05  # a wrong adapter could not hide
    assert (got - want).abs().max() < 2e-4


# --router FILE


@pytest.mark.parametrize("k", [1, 2, 3])
def test_routers_in_a_file(k: int, experts: Any, base: Any, tmp_path: Path) -> None:
    file = write_routers(tmp_path / "r/routers.safetensors", 3)
    code, found = run(
        *named(experts), "--router", file, "--score", "softmax", "--select", "top_k", "--k", k,
        "--weight", "renormalise", "--out", tmp_path / "out",
    )  # fmt: skip
    assert (code, found["system"], found["layers"], found["rank"]) == (0, "bundle", 12, 12)

    def weigh(u: torch.Tensor, name: str) -> torch.Tensor:
        p = torch.softmax(u, -1)
        top = p.topk(k)
        return torch.zeros_like(p).scatter(-1, top.indices, top.values / top.values.sum(-1, True))

    adapter = load_adapter(tmp_path / "out")
    assert adapter.digest == found["digest"] and adapter.base_model == "base_llama"
    with torch.no_grad():
        without = base(IDS).logits
    close(logits(base, adapter), by_hand(base, experts, file, weigh), without)


def test_other_gates_and_a_bias(experts: Any, base: Any, tmp_path: Path) -> None:
    file = write_routers(tmp_path / "r/routers.safetensors", 3, bias=True)
    code, found = run(
        *named(experts), "--router", file, "--score", "sigmoid", "--select", "threshold",
        "--weight", "softmax", "--temperature", 0.5, "--gate", "threshold=0.45",
        "--gate", "bias=select", "--gate", "constant=2", "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0 and "threshold=0.45" in found["gates"][0]
    bias = load_file(file)

    def weigh(u: torch.Tensor, name: str) -> torch.Tensor:
        p = torch.sigmoid(u)
        kept = p + bias[f"{PREFIX}{name}.router.bias"] >= 0.45
        return 2 * torch.softmax(torch.where(kept, p / 0.5, -torch.inf), -1).nan_to_num()

    with torch.no_grad():
        without = base(IDS).logits
    want = by_hand(base, experts, file, weigh)
    close(logits(base, load_adapter(tmp_path / "out")), want, without)


def test_the_flags_are_those_of_inspect(experts: Any, tmp_path: Path) -> None:
    code, found = run(
        *named(experts), "--router", "arrow", "--k", 1, "--out", tmp_path / "out"
    )  # fmt: skip
    done = CliRunner().invoke(app, ["inspect", str(tmp_path / "out"), "--json"])
    assert (code, done.exit_code) == (0, 0)
    assert found["flags"] == json.loads(done.stdout)["flags"]
    assert found["flags"][1] == "--max-lora-rank 16"
    text = CliRunner().invoke(
        app,
        ["bundle", *named(experts), "--router", "uniform", "--out", str(tmp_path / "other")],
    )
    assert text.exit_code == 0
    assert "vllm serve base_llama --enable-lora" in text.stdout and "expert 1: code" in text.stdout


# --router DIR


def test_routers_of_an_adapter(base: Any, tmp_path: Path) -> None:
    """LoRA-Mixer's folder holds both the experts and the routers over them."""
    whole = write_lora_mixer(
        tmp_path / "in", 3, ranks=(3, 5, 2), k=2, use_rslora=True, settings={"renormalise": False}
    )
    folders = {name: whole / name for name in ("expert_0", "expert_1", "expert_2")}
    assert run(*named(folders), "--router", whole, "--out", tmp_path / "out")[0] == 0
    assert differing(load_adapter(whole), load_adapter(tmp_path / "out")) == []
    # A field that is given wins over the adapter's own.
    code, _ = run(*named(folders), "--router", whole, "--k", 1, "--out", tmp_path / "one")
    assert code == 0
    assert {m.gate.k for m in load_adapter(tmp_path / "one").modules.values()} == {1}


def test_the_example_trains_a_router_that_can_be_given(tmp_path: Path) -> None:
    folders = {task: EXAMPLES / task for task in ("words", "date", "time")}
    code, found = run(
        *named(folders), "--router", EXAMPLES / "routed", "--dtype", "float16", "--out",
        tmp_path / "out",
    )  # fmt: skip
    assert (code, found["layers"]) == (0, 7 * 16)
    assert differing(load_adapter(EXAMPLES / "routed"), load_adapter(tmp_path / "out")) == []


# --router arrow


@pytest.mark.parametrize(
    ("seed", "shape"),
    [
        (11, {"experts": 4, "k": 2, "temperature": 0.5}),
        (-3, {"experts": 3, "k": 3, "r": 5, "use_rslora": True}),
        (None, {"experts": 5, "k": 1, "r": 2, "temperature": 3.0}),
        (0, {"experts": 1, "k": 1, "r": 7}),
    ],
)
def test_arrow_is_what_the_arrow_reader_reads(seed: Any, shape: Any, tmp_path: Path) -> None:
    mode = {"prototypes": "svd", "rng_seed": None} if seed is None else {"rng_seed": seed}
    folder = write_arrow(tmp_path / "in", 5, **shape, **mode)
    folders = {f"e{i}": folder / f"task_{i}" for i in range(shape["experts"])}
    code, found = run(
        *named(folders), "--router", "arrow", "--k", shape["k"],
        *(["--seed", seed] if seed is not None else []),
        *(["--temperature", shape["temperature"]] if "temperature" in shape else []),
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert (code, found["system"]) == (0, "arrow")
    want, got = load_adapter(folder), load_adapter(tmp_path / "out")
    assert differing(want, got) == [] and got.system == want.system


# --router uniform


def relative(adapter: Any, factors: Any) -> float:
    errors = []
    assert set(adapter.modules) == set(factors.modules)
    for name, module in adapter.modules.items():
        got, want = module.b_NR @ module.a_RK, factors.modules[name].delta()
        errors.append(float((got - want).norm() / want.norm()))
    return max(errors)


def test_uniform_is_the_average(experts: Any, tmp_path: Path) -> None:
    factors = [load_factors(folder) for folder in experts.values()]
    for shares, weights in (
        ({}, [1 / 3] * 3),
        ({"math": 0.7, "text": -0.2, "code": 1}, [0.7, 1, -0.2]),
    ):
        given = [word for n, w in shares.items() for word in ("--share", f"{n}={w}")]
        out = tmp_path / f"out{len(shares)}"
        assert run(*named(experts), "--router", "uniform", *given, "--out", out)[0] == 0
        terms = [Term(f, w) for f, w in zip(factors, weights, strict=True)]
        adapter = load_adapter(out)
        assert relative(adapter, merge("cat", terms).factors) < 1e-6
        assert adapter.router_rows == 0 and adapter.system == "uniform"


# --router request


def test_each_request_gives_the_weights(experts: Any, tmp_path: Path) -> None:
    assert run(*named(experts), "--router", "request", "--out", tmp_path / "out")[0] == 0
    adapter = load_adapter(tmp_path / "out")
    assert [c.to_dict() for c in adapter.columns] == [
        {"scale": 0.0, "expert": name} for name in experts
    ]
    factors = [load_factors(folder) for folder in experts.values()]
    weights = torch.tensor([[0.7, 0.0, -0.2], [0.0, 1.0, 0.0]])
    for name, module in adapter.modules.items():
        x = normal(np.random.default_rng(0), 2, module.a_RK.shape[1])
        want = sum(
            w[:, None] * (x @ f.modules[name].delta().T)
            for w, f in zip(weights.T, factors, strict=True) if name in f.modules
        )  # fmt: skip
        torch.testing.assert_close(delta_reference(module, x, weights), want, atol=1e-5, rtol=1e-4)


def test_what_becomes_of_given_weights_is_the_gates_to_say(experts: Any, tmp_path: Path) -> None:
    more = ("--select", "top_k", "--k", "2", "--weight", "renormalise", "--score", "softmax")
    assert run(*named(experts), "--router", "request", *more, "--out", tmp_path / "out")[0] == 0
    gates = {m.gate for m in load_adapter(tmp_path / "out").modules.values()}
    assert {(g.source, g.select, g.k, g.weight) for g in gates} == {
        ("request", "top_k", 2, "renormalise")
    }
    out = ("--router", "request", "--out", str(tmp_path / "x"))
    assert "means nothing" in usage_error(*named(experts), *out, "--gate", "source=router")


# Experts


def test_an_expert_that_lacks_layers_adds_nothing_there(base: Any, tmp_path: Path) -> None:
    folders = {
        "all": write_plain(tmp_path / "in/all", 1, r=3),
        "some": write_plain(
            tmp_path / "in/some", 2, r=2, targets=("q_proj", "up_proj"), layers=[1]
        ),
    }
    file = write_routers(tmp_path / "r/routers.safetensors", 2)
    code, found = run(
        *named(folders), "--router", file, "--score", "softmax", "--out", tmp_path / "out"
    )
    assert code == 0 and list(found["lacking"]) == ["some"] and len(found["lacking"]["some"]) == 10
    own = {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"}
    adapter, routers = load_adapter(tmp_path / "out"), load_file(file)
    parts = [load_factors(folder).modules for folder in folders.values()]
    for name, module in adapter.modules.items():
        assert (module.rank == 5) == (name in own)
        x = normal(np.random.default_rng(0), 6, module.a_RK.shape[1])
        p = torch.softmax(x @ routers[f"{PREFIX}{name}.router.weight"].T, -1)
        want = sum(
            p[:, e : e + 1] * (x @ pairs[name].delta().T)
            for e, pairs in enumerate(parts) if name in pairs
        )  # fmt: skip
        torch.testing.assert_close(delta_reference(module, x), want, atol=1e-5, rtol=1e-4)


def test_arrow_never_prefers_an_expert_without_the_layer(tmp_path: Path) -> None:
    folders = {
        "none": write_plain(tmp_path / "in/none", 2, r=2, targets=("q_proj",)),
        "all": write_plain(tmp_path / "in/all", 1, r=3),
    }
    experts = [read_expert(name, folder) for name, folder in folders.items()]
    assert set(lacking(experts)) == {"none"}
    made = bundle(experts, bundle_module.Arrow(k=1))
    module = made.modules["model.layers.0.mlp.up_proj"]
    assert not module.router_GK[0].any()  # type: ignore[index]
    x = normal(np.random.default_rng(0), 50, module.a_RK.shape[1])
    assert ((x @ module.router_GK.T).abs().argmax(-1) == 1).all()  # type: ignore[union-attr]


def test_experts_of_other_formats(tmp_path: Path) -> None:
    """What reads as a plain delta can be an expert: here a LoHa beside a LoRA."""
    loha = next(p for p in (FIXTURES / "merged" / "loha").rglob("adapter_config.json")).parent
    plain = FIXTURES / "merged" / "inputs" / "eq1"
    experts = [read_expert("loha", loha), read_expert("plain", plain)]
    made = bundle(experts, Uniform())
    for name, pair in load_factors(loha).modules.items():
        got = made.modules[name].b_NR[:, : pair.rank] @ made.modules[name].a_RK[: pair.rank]
        torch.testing.assert_close(2 * got, pair.delta())


# Routed adapters side by side


def test_routed_adapters_side_by_side(base: Any, tmp_path: Path) -> None:
    one = write_lora_mixer(tmp_path / "one", 1, ranks=(3, 2), k=2)
    two = write_lora_mixer(tmp_path / "two", 2, ranks=(1, 4, 2), k=2)
    code, found = run("--routed", one, "--routed", two, "--out", tmp_path / "out")
    assert (code, found["router_rows"], found["rank"]) == (0, 5, 12)
    want = concat_routed([load_adapter(one), load_adapter(two)])
    assert differing(want, load_adapter(tmp_path / "out")) == []
    code, found = run("--routed", one, "--routed", two, "--k", 4, "--out", tmp_path / "four")
    assert code == 0 and "k=4" in found["gates"][0]
    assert refused("--routed", one, "--routed", two, "--k", 6, "--out", tmp_path / "x") == (
        "k_too_large"
    )
    assert refused("--routed", one, "--out", tmp_path / "x") == "bad_value"
    other = write_lora_mixer(tmp_path / "three", 3, ranks=(1, 4), k=1)
    assert refused("--routed", one, "--routed", other, "--out", tmp_path / "x") == (
        "setting_mismatch"
    )
    assert not (tmp_path / "x").exists()


# Refusals


def test_routers_that_do_not_fit(experts: Any, tmp_path: Path) -> None:
    out = ["--score", "softmax", "--out", tmp_path / "out"]
    good = load_file(write_routers(tmp_path / "r/good.safetensors", 3))

    def attempt(tensors: Any, *more: object) -> str:
        file = tmp_path / "r/bad.safetensors"
        save_file(tensors, file)
        return refused(*named(experts), "--router", file, *more, *out)

    name = next(iter(good))
    less = {key: value for key, value in good.items() if key != name}
    assert attempt(less) == "missing_tensor"
    stray = PREFIX + "model.layers.0.self_attn.o_proj.router.weight"
    assert attempt({**good, stray: good[name].clone()}) == "unexpected_tensor"
    for wrong in ("gate.weight", name.replace(".router.weight", ".lora_A.weight")):
        assert attempt({**good, wrong: good[name].clone()}) == "unexpected_tensor"
    assert attempt({**good, name: good[name][:2].clone()}) == "setting_mismatch"
    assert attempt({**good, name: good[name][0].clone()}) == "setting_mismatch"
    assert attempt({**good, name: good[name][:, :-1].clone()}) == "bad_shape"
    assert attempt({**good, name: good[name].int()}) == "bad_dtype"
    assert attempt({**good, name: good[name] * torch.nan}) == "not_finite"
    assert attempt({**good, name.removeprefix(PREFIX): good[name].clone()}) == "duplicate_tensor"
    bias = name.replace("weight", "bias")
    assert attempt({**good, bias: torch.zeros(3)}) == "unexpected_tensor"
    assert attempt({**less, bias: torch.zeros(3)}) == "missing_tensor"
    assert attempt(good, "--gate", "bias=select") == "missing_tensor"
    assert attempt(good, "--k", 2) == "bad_gate"
    assert attempt(good, "--select", "top_k", "--k", 4) == "k_too_large"
    assert attempt(good, "--gate", "colour=blue") == "unknown_key"
    assert attempt(good, "--gate", "blocks=[1,1,1]") == "unknown_key"
    assert attempt(good, "--gate", "source=self") == "bad_gate"
    file = tmp_path / "r/good.safetensors"
    assert refused(*named(experts), "--router", file, "--out", tmp_path / "out") == (
        "missing_setting"
    )
    file.write_bytes(file.read_bytes()[:1000])
    assert refused(*named(experts), "--router", file, *out) == "bad_safetensors"
    assert refused(*named(experts), "--router", tmp_path / "nowhere", *out) == "not_found"
    assert not (tmp_path / "out").exists()


def test_adapters_whose_routers_cannot_be_given(experts: Any, tmp_path: Path) -> None:
    for folder in (
        FIXTURES / "routed/mixlora-a/adapter", write_moram(tmp_path / "moram"), experts["math"],
    ):  # fmt: skip
        assert refused(*named(experts), "--router", folder, "--out", tmp_path / "out") == (
            "unsupported_feature"
        )


def test_experts_that_do_not_belong_together(experts: Any, tmp_path: Path) -> None:
    def attempt(folder: Path) -> tuple[str, str]:
        code, found = run(
            *named({**experts, "odd": folder}), "--router", "uniform", "--out", tmp_path / "out"
        )
        assert code == 1
        return found["error"]["code"], found["error"]["message"]

    other = write_plain(tmp_path / "other", 4, "base_qwen2")
    assert attempt(other)[0] == "setting_mismatch"
    with_config(other, base_model_name_or_path="")
    assert attempt(other)[0] == "shape_mismatch"
    code, message = attempt(write_moram(tmp_path / "moram"))
    assert code == "unsupported_feature" and message.startswith("expert 'odd':")
    assert "--routed" in message
    assert attempt(tmp_path / "nowhere")[0] == "not_found"
    broken = shutil.copytree(experts["math"], tmp_path / "broken")
    with_tensors(broken, lambda t: t.update({"extra.weight": torch.ones(2)}))
    assert attempt(broken)[0] == "unexpected_tensor"
    embedding = shutil.copytree(experts["math"], tmp_path / "embedding")
    with_tensors(embedding, lambda t: t.update({
        f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.ones(3, 512),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": torch.ones(128, 3),
    }))  # fmt: skip
    assert attempt(embedding)[0] == "unsupported_feature"
    assert not (tmp_path / "out").exists()


def test_the_library_refuses_no_experts_and_double_names(experts: Any) -> None:
    with pytest.raises(AdapterError) as caught:
        bundle([], Uniform())
    assert caught.value.code == "empty_adapter"
    twice = [read_expert("math", experts["math"])] * 2
    with pytest.raises(AdapterError) as caught:
        bundle(twice, Uniform())
    assert caught.value.code == "bad_value"
    with pytest.raises(AdapterError) as caught:
        bundle(twice[:1], Uniform((0.5, 0.5)))
    assert caught.value.code == "bad_value"
    with pytest.raises(AdapterError) as caught:
        bundle(twice[:1], bundle_module.Arrow(k=1, seed=2**64))
    assert caught.value.code == "bad_value"


def test_wrong_usage(experts: Any, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "out"]
    some = named(experts)
    assert "--adapter NAME=DIR" in usage_error("--router", "uniform", *out)
    assert "say what chooses" in usage_error(*some, *out)
    assert "not NAME=VALUE" in usage_error("--adapter", "x", "--router", "uniform", *out)
    assert "there twice" in usage_error(*some, *some[:2], "--router", "uniform", *out)
    assert "Arrow needs it" in usage_error(*some, "--router", "arrow", *out)
    arrow = [*some, "--router", "arrow", "--k", 1, *out]
    assert "means nothing" in usage_error(*arrow, "--score", "softmax")
    assert "only with --router uniform" in usage_error(*arrow, "--share", "math=1")
    uniform = [*some, "--router", "uniform", *out]
    assert "only with --router arrow" in usage_error(*uniform, "--seed", 1)
    assert "means nothing" in usage_error(*uniform, "--k", 1)
    assert "code, text" in usage_error(*uniform, "--share", "math=1")
    assert "is no number" in usage_error(*uniform, "--share", "math=much")
    assert "has an option" in usage_error(*arrow, "--gate", "k=2")
    routed = ["--routed", tmp_path / "a", "--routed", tmp_path / "b", *out]
    assert "not together with --routed" in usage_error(*routed, *some)
    assert "not together with --routed" in usage_error(*routed, "--router", "arrow")
    assert "means nothing" in usage_error(*routed, "--score", "softmax")
    assert not (tmp_path / "out").exists()


# Where the result goes


def test_what_is_there_is_kept(experts: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [*named(experts), "--router", "uniform", "--out", out]
    assert run(*arguments)[0] == 0
    record = json.loads((out / RECORD).read_text())
    assert [e["name"] for e in record["experts"]] == ["math", "code", "text"]
    assert run(*arguments)[0] == 0  # an earlier bundle is replaced
    (out / "README.md").write_text("mine")
    before = contents(out)
    assert refused(*arguments) == "output_exists"
    assert contents(out) == before
    assert run(*arguments, "--force")[0] == 0
    assert contents(tmp_path / "out.old") == before
    for place in (experts["math"], experts["math"] / "x", tmp_path / "in"):
        assert refused(*arguments[:-1], place, "--force") == "output_exists"
    assert sorted(os.listdir(tmp_path)) == ["in", "out", "out.old"]


@pytest.mark.parametrize("step", ["fill_native", "differing", "write_record"])
def test_a_failure_leaves_everything_as_it_was(
    step: str, experts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bundle([read_expert(name, folder) for name, folder in experts.items()], Uniform())
    write_bundle(made, tmp_path / "out", {}, list(experts.values()))
    before = contents(tmp_path)

    def broken(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    module = bundle_module if step == "write_record" else convert_module
    monkeypatch.setattr(module, step, broken)
    with pytest.raises(AdapterError, match="No space left") as caught:
        write_bundle(made, tmp_path / "out", {}, list(experts.values()))
    assert caught.value.code == "output_failed"
    assert contents(tmp_path) == before


def test_a_value_that_the_dtype_cannot_hold(experts: Any, tmp_path: Path) -> None:
    with_tensors(experts["math"], lambda t: t.update({k: v * 1e6 for k, v in t.items()}))
    assert refused(
        *named(experts), "--router", "uniform", "--dtype", "float16", "--out", tmp_path / "out"
    ) == "overflow"  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_help_teaches() -> None:
    done = CliRunner().invoke(app, ["bundle", "--help"])
    text = " ".join(done.stdout.replace("│", " ").split())
    assert done.exit_code == 0
    assert "Examples" in text and "--router arrow" in text and "Exit code 0" in text


def test_a_router_read_by_the_library(experts: Any, tmp_path: Path) -> None:
    file = write_routers(tmp_path / "r/routers.safetensors", 3)
    given = read_router(file, {"score": "softmax"})
    made = bundle([read_expert(name, folder) for name, folder in experts.items()], given)
    assert {m.gate.source for m in made.modules.values()} == {"router"}
    assert {m.gate.blocks for n, m in made.modules.items() if "q_proj" in n} == {(3, 5, 4)}
