"""Weights learned for LoRA Soups: what they find, that the gradient is right, the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from make_adapters import BASE_LLAMA
from make_multi import write_plain
from merging.random_factors import random_factors
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from vllm_lora_ext.adapters import RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.hf import apply_adapter
from vllm_lora_ext.cli import app
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging import Factors, Term, load_factors, load_soups, merge
from vllm_lora_ext.merging.soups.files import read_examples, save_soups, soup_folders, tokenise
from vllm_lora_ext.merging.soups.learn import Example, _loss, _mixed, _mixes, learn_soups

TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(BASE_LLAMA, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two strong adapters: other ranks, other scales."""
    where = tmp_path_factory.mktemp("adapters")
    return [
        write_plain(where / "a", 1, r=4, alpha=24, targets=TARGETS),
        write_plain(where / "b", 2, r=3, alpha=18, targets=TARGETS),
    ]


@pytest.fixture(scope="module")
def pair(folders):
    return [load_factors(folder) for folder in folders]


def applied(model, factors):
    modules = {n: RoutedModule(p.a_RK, p.b_NR) for n, p in factors.modules.items() if p.rank}
    return apply_adapter(model, RoutedAdapter(modules, "plain"))


def mixture(pair, weights):
    """`merge` with a map module → weight per adapter: nothing of the learner's own code."""
    terms = [Term(f, w) for f, w in zip(pair, weights, strict=True)]
    return merge("cat", terms).factors


def examples_of(model, factors, count=24, seed=0):
    """Random prompts, and what the adapted model answers greedily."""
    draw = torch.Generator().manual_seed(seed)
    prompts = torch.randint(4, 500, (count, 5), generator=draw)
    with applied(model, factors):
        out = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=6, do_sample=False
        )
    rows = out[:, 5:].tolist()
    # Of different lengths, so that batches are padded.
    return [
        Example(prompt, row[: 3 + i % 4])
        for i, (prompt, row) in enumerate(zip(prompts.tolist(), rows, strict=True))
    ]


def mean_loss(model, examples):
    """Loss per completion token, one example at a time, without padding."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for e in examples:
            logits = model(torch.tensor([[*e.prompt, *e.completion]])).logits[0].double()
            logp = torch.log_softmax(logits, -1)
            for i, token in enumerate(e.completion, start=len(e.prompt) - 1):
                total, tokens = total - float(logp[i, token]), tokens + 1
    return total / tokens


def test_examples_of_one_adapter_lead_to_it(model, pair):
    for target in (0, 1):
        soup = learn_soups(model, pair, examples_of(model, pair[target]), steps=40, rate=0.3)
        chosen = list(soup.weights[target].values())
        print(f"target {target}: {soup.before:.3f} -> {soup.after:.3f}, {min(chosen):.3f}")
        assert len(chosen) == 12
        assert sum(chosen) / len(chosen) > 0.85 and min(chosen) > 0.5
        assert soup.after < 0.7 * soup.before
        for name in soup.weights[0]:
            assert sum(table[name] for table in soup.weights) == pytest.approx(1)


def test_a_mixture_is_found_module_by_module(model, pair):
    """The first adapter's attention with the second's MLP."""
    names = list(pair[0].modules)
    attention = {name: float("self_attn" in name) for name in names}
    mlp = {name: 1 - value for name, value in attention.items()}
    teacher = mixture(pair, (attention, mlp))
    soup = learn_soups(model, pair, examples_of(model, teacher, 32), steps=60, rate=0.3)
    right = [soup.weights[0][name] if attention[name] else soup.weights[1][name] for name in names]
    print(f"mixture: {soup.before:.3f} -> {soup.after:.3f}, {sorted(right)[:3]}")
    assert sum(right) / len(right) > 0.8 and soup.after < 0.75 * soup.before


def test_losses_are_those_of_the_merged_adapter(model, pair):
    examples = examples_of(model, pair[1], 7)
    soup = learn_soups(model, pair, examples, steps=3, batch=4)
    with applied(model, mixture(pair, (0.5, 0.5))):
        assert soup.before == pytest.approx(mean_loss(model, examples), rel=1e-4)
    with applied(model, mixture(pair, soup.weights)):
        assert soup.after == pytest.approx(mean_loss(model, examples), rel=1e-4)
    assert len(soup.losses) == 3


def test_gradient_against_finite_differences(model, pair):
    """The loss of merged adapters, a scalar moved by ±h, against autograd."""
    examples = examples_of(model, pair[0], 4)
    names, h = sorted(pair[0].modules), 0.05
    draw = torch.Generator().manual_seed(3)
    scalars = {name: torch.randn(2, generator=draw) for name in names}
    mixes = _mixes(pair, torch.device("cpu"))
    for name, mix in mixes.items():
        mix.scalar_I = scalars[name].clone().requires_grad_()
    with _mixed(model, mixes):
        loss, tokens = _loss(model, examples)
        gradients = torch.autograd.grad(loss / tokens, [mixes[n].scalar_I for n in names])

    def loss_at(name, i, by):
        moved = {n: s.clone() for n, s in scalars.items()}
        moved[name][i] += by
        p = {n: torch.softmax(s, 0).tolist() for n, s in moved.items()}
        with applied(model, mixture(pair, [{n: p[n][j] for n in names} for j in range(2)])):
            return mean_loss(model, examples)

    size = max(float(g.abs().max()) for g in gradients)
    assert size > 0.01
    for at in (0, 5, 11):
        for i in range(2):
            name = names[at]
            slope = (loss_at(name, i, h) - loss_at(name, i, -h)) / (2 * h)
            assert slope == pytest.approx(float(gradients[at][i]), abs=0.02 * size)


def test_the_same_seed_gives_the_same_weights(model, pair):
    examples = examples_of(model, pair[0], 10)

    def learn(seed):
        return learn_soups(model, pair, examples, steps=4, batch=3, seed=seed)

    first = learn(5)
    assert first == learn(5)
    assert first.scalars != learn(6).scalars


def test_the_model_stays_as_it_is(model, pair):
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.train()
    model.model.layers[0].eval()
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    asked = []
    learn_soups(
        model, pair, examples_of(model, pair[0], 3), steps=2,
        progress=lambda done, steps, loss: asked.append((done, steps, loss)),
    )  # fmt: skip
    assert model.training and not model.model.layers[0].training
    model.eval()
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None
    assert [a[:2] for a in asked] == [(1, 2), (2, 2)] and all(a[2] > 0 for a in asked)


def test_a_module_of_one_adapter_keeps_all_of_it(model, pair):
    name = "model.layers.1.self_attn.q_proj"
    less = Factors({n: p for n, p in pair[1].modules.items() if n != name})
    soup = learn_soups(model, [pair[0], less], examples_of(model, pair[0], 4), steps=2)
    assert soup.weights[0][name] == 1.0 and soup.scalars[0][name] == 0.0
    assert name not in soup.weights[1]


def test_what_does_not_fit_is_refused(model, pair):
    good = [Example([4, 5], [6])]

    def refused(code, adapters=pair, examples=good, **more):
        with pytest.raises(AdapterError) as caught:
            learn_soups(model, adapters, examples, **{"steps": 1, **more})
        assert caught.value.code == code

    refused("bad_value", pair[:1])
    refused("bad_value", examples=[])
    refused("bad_value", examples=[Example([4], [])])
    refused("bad_value", examples=[Example([], [4])])
    refused("bad_value", steps=0)
    refused("bad_value", batch=0)
    refused("bad_value", rate=0.0)
    refused("bad_value", rate=float("nan"))
    refused("setting_mismatch", [Factors(p.modules, f"org/{i}") for i, p in enumerate(pair)])
    other = random_factors(1, shapes={"model.layers.9.x": (3, 4)}).modules
    refused("unknown_module", [*pair, Factors(other)])
    up = "model.layers.0.mlp.up_proj"
    refused("shape_mismatch", [*pair, Factors({up: random_factors(1).modules[
        "model.layers.0.mlp.down_proj"]})])  # fmt: skip
    huge = {n: p._replace(b_NR=p.b_NR * 1e38) for n, p in pair[0].modules.items()}
    refused("not_finite", [Factors(huge), pair[1]])


# Files


def test_a_run_is_read_by_load_soups(model, pair, folders, tmp_path):
    soup = learn_soups(model, pair, examples_of(model, pair[0], 6), steps=5, rate=0.3)
    written = save_soups(folders, soup.scalars, tmp_path / "run")
    assert [f.name for f in written] == ["adapter_0", "adapter_1"]
    terms = load_soups(soup_folders(tmp_path / "run"))
    for term, weights in zip(terms, soup.weights, strict=True):
        assert term.weight == weights
    merged = merge("soups", terms).factors
    ids = torch.arange(4, 40)[None]
    mixes = _mixes(pair, torch.device("cpu"))
    for name, mix in mixes.items():
        mix.scalar_I = torch.tensor([table[name] for table in soup.scalars])
    with torch.no_grad(), _mixed(model, mixes):
        want = model(ids).logits
    with torch.no_grad(), applied(model, merged):
        assert (model(ids).logits - want).abs().max() < 1e-4
    # The adapters' own tensors are untouched.
    for folder, copy in zip(folders, written, strict=True):
        before = load_file(folder / "adapter_model.safetensors")
        after = load_file(copy / "adapter_model.safetensors")
        assert set(after) - set(before) == {
            n.replace("lora_A.weight", "lora_learnable_weights") for n in before if "lora_A" in n
        }
        assert all(torch.equal(after[n], t) for n, t in before.items())


def test_runs_are_whole_or_not_there(folders, tmp_path):
    table = [dict.fromkeys(load_factors(folder).modules, 0.0) for folder in folders]
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("x")
    with pytest.raises(AdapterError) as caught:
        save_soups(folders, table, tmp_path / "full")
    assert caught.value.code == "output_exists"
    with pytest.raises(AdapterError) as caught:
        save_soups([folders[0], tmp_path / "nowhere"], table, tmp_path / "new")
    assert caught.value.code == "not_found"
    assert [p.name for p in tmp_path.iterdir()] == ["full"]
    (tmp_path / "empty").mkdir()
    save_soups(folders, table, tmp_path / "empty", {"by": "hand"})
    assert json.loads((tmp_path / "empty/soups.json").read_text()) == {"by": "hand"}


def test_folders_of_a_run_come_in_order(tmp_path):
    for i in range(12):
        (tmp_path / f"adapter_{i}").mkdir()
    assert [f.name for f in soup_folders(tmp_path)] == [f"adapter_{i}" for i in range(12)]
    (tmp_path / "adapter_3").rmdir()
    for run in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(AdapterError) as caught:
            soup_folders(run)
        assert caught.value.code == "missing_file"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('{"prompt": "a"}', "missing_key"), ('{"prompt": "a", "completion": ""}', "bad_value"),
        ('{"prompt": 3, "completion": "b"}', "bad_value"), ('["a", "b"]', "bad_json"),
        ('{"prompt": "a", "completion": "b", "label": 1}', "unknown_key"),
        ('{"prompt": "a", "completion": "b", "prompt": "c"}', "bad_json"), ("{", "bad_json"),
        ('{"prompt": "a", "completion": "b"}\n\n{"prompt": "a"}', "missing_key"),
    ],
)  # fmt: skip
def test_examples_are_read_strictly(text, code, tmp_path):
    file = tmp_path / "few.jsonl"
    file.write_text(text)
    with pytest.raises(AdapterError, match=r"line \d") as caught:
        read_examples(file)
    assert caught.value.code == code


def test_examples_with_line_breaks_in_the_text(tmp_path):
    file = tmp_path / "few.jsonl"
    rows = [("a\nb", "c\u2028d"), ("é", "ß")]
    file.write_bytes(b"\r\n".join(
        json.dumps({"prompt": p, "completion": c}, ensure_ascii=False).encode() for p, c in rows
    ) + b"\n\n")  # fmt: skip
    assert read_examples(file) == rows
    with pytest.raises(AdapterError) as caught:
        read_examples(tmp_path / "nowhere")
    assert caught.value.code == "not_found"


# The command


WORDS = [f"w{i}" for i in range(508)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The tiny model with a tokenizer of whole words: w0 is 4, w1 is 5, ..."""
    where = tmp_path_factory.mktemp("base")
    for file in BASE_LLAMA.iterdir():
        (where / file.name).symlink_to(file)
    ids = {"<unk>": 0, "<s>": 1, "</s>": 2, "<user>": 3} | {w: i for i, w in enumerate(WORDS, 4)}
    plain = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    plain.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(where)
    return where, tokenizer


def test_tokens_of_examples(base):
    _, tokenizer = base
    assert tokenise(tokenizer, [("w0 w1", " w2")], chat=False) == [Example([4, 5], [6, 2])]
    # Joined to the prompt's last word, the completion is no word any more: tokenised alone.
    assert tokenise(tokenizer, [("w0 w1", "2 w2")], chat=False) == [Example([4, 5], [0, 6, 2])]
    with pytest.raises(AdapterError) as caught:
        tokenise(tokenizer, [("w0", "w1")], chat=True)
    assert caught.value.code == "missing_setting"
    tokenizer.chat_template = "{% for m in messages %}<user> {{ m.content }}{% endfor %}"
    try:
        assert tokenise(tokenizer, [("w0", "w1")], chat=True)[0].completion == [5, 2]
    finally:
        tokenizer.chat_template = None


def command(base: Path, folders, file: Path, *more: object):
    adapters = [word for i, f in enumerate(folders) for word in ("--adapter", f"a{i}={f}")]
    done = CliRunner().invoke(
        app, ["soups", "--base", str(base), *adapters, "--examples", str(file), *map(str, more)]
    )
    return done.exit_code, done.stdout, " ".join(done.output.replace("│", " ").split())


def test_the_command_learns(base, model, pair, folders, tmp_path):
    where, _ = base
    rows = [
        {"prompt": " ".join(WORDS[i - 4] for i in e.prompt),
         "completion": " " + " ".join(WORDS[i - 4] if i >= 4 else "<s>" for i in e.completion)}
        for e in examples_of(model, pair[1], 16)
    ]  # fmt: skip
    file = tmp_path / "few.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "run"
    settings = ("--steps", 20, "--rate", 0.3, "--out", out)
    code, stdout, _ = command(where, folders, file, *settings, "--json")
    found = json.loads(stdout)
    assert code == 0 and found["ok"] and found["loss_after"] < found["loss_before"]
    weights = [list(part["weights"].values()) for part in found["adapters"]]
    assert sum(weights[1]) / len(weights[1]) > 0.6
    terms = load_soups(found["folders"])
    assert terms[1].weight == found["adapters"][1]["weights"]
    code, stdout, _ = command(where, folders, file, *settings, "--json")
    assert (code, json.loads(stdout)["error"]["code"]) == (1, "output_exists")
    code, stdout, _ = command(
        where, folders, file, "--steps", 1, "--out", tmp_path / "text", "--batch-size", 3
    )
    assert code == 0 and "lora_soups_softmax" in stdout and "mean weight" in stdout


def test_the_command_refuses(base, folders, tmp_path):
    file = tmp_path / "few.jsonl"
    file.write_text('{"prompt": "w0", "completion": "w1"}')
    out = ("--out", tmp_path / "run", "--json")
    assert command(base[0], folders[:1], file, *out)[0] == 2
    for arguments, code in (
        ((base[0], folders, tmp_path / "nowhere"), "not_found"),
        ((tmp_path / "nowhere", folders, file), "not_found"),
        ((base[0], [folders[0], tmp_path / "nowhere"], file), "not_found"),
    ):
        status, stdout, _ = command(*arguments, *out)
        assert (status, json.loads(stdout)["error"]["code"]) == (1, code)
    status, stdout, _ = command(base[0], folders, file, "--chat", *out)
    assert (status, json.loads(stdout)["error"]["code"]) == (1, "missing_setting")
    assert not (tmp_path / "run").exists()


def test_help_teaches():
    done = CliRunner().invoke(app, ["soups", "--help"])
    text = " ".join(done.stdout.replace("│", " ").split())
    assert done.exit_code == 0 and "Example" in text and "Exit code 0" in text
