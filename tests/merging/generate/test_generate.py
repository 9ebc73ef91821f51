"""Generated adapters: ICM-LoRA's decoder, the fusion VAE, and SG-LoRA's library."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.factors import Factors, Pair, load_factors, save_peft
from vllm_lora_ext.merging.generate import (
    Decoder,
    ExpertLibrary,
    LibraryEntry,
    Training,
    decode_adapter,
    fuse,
    minilm,
    read_layout,
)
from vllm_lora_ext.merging.generate.icm_fusion import align

CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 8, "use_rslora": True, "target_modules": []}
NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj")


@pytest.fixture(autouse=True, scope="module")
def _no_gradients():
    with torch.no_grad():
        yield


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def code_of(call):
    with pytest.raises(AdapterError) as refused:
        call()
    return refused.value.code


def adapter(seed, rank=4, width=24, out=18, names=NAMES):
    modules = {
        name: Pair(
            rand(rank, width, seed=10 * seed + i) + 0.7 * rand(rank, width, seed=900 + i),
            rand(out, rank, seed=10 * seed + i + 5) + 0.7 * rand(out, rank, seed=950 + i),
        )
        for i, name in enumerate(names)
    }
    return Factors(modules, base_model="tiny")


def relative(seen, want):
    return max(
        float((seen.modules[n].delta() - p.delta()).norm() / p.delta().norm())
        for n, p in want.modules.items()
    )


# ICM-LoRA


class Cvae(nn.Module):
    """The decoding half as its authors describe it, with fewer and other channels."""

    def __init__(self, latent, condition, kernel, channels, last):
        super().__init__()
        self.to_decode = nn.Linear(latent + condition, last * channels[0])
        grow = lambda i, o: nn.ConvTranspose1d(  # noqa: E731
            i, o, kernel, 2, kernel // 2, output_padding=1
        )
        pairs = pairwise(channels)
        self.decoder = nn.Sequential(
            *(nn.Sequential(grow(i, o), nn.BatchNorm1d(o), nn.ELU()) for i, o in pairs)
        )
        end = channels[-1]
        self.final_layer = nn.Sequential(
            grow(end, end), nn.BatchNorm1d(end), nn.ELU(),
            nn.Conv1d(end, 1, kernel, 1, kernel // 2),
        )  # fmt: skip
        self.channels, self.last = channels, last

    def forward(self, z, condition):
        x = self.to_decode(torch.cat([z, condition])).view(1, self.channels[0], self.last)
        return self.final_layer(self.decoder(x))[0, 0]


@pytest.fixture
def generator(tmp_path):
    torch.manual_seed(2)
    model = Cvae(latent=5, condition=3, kernel=7, channels=[6, 10, 4, 8], last=9).eval()
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.copy_(torch.rand(buffer.shape) + 0.5)
    save_file(model.state_dict(), tmp_path / "cvae.safetensors")
    layout, at = {}, 0
    for name in NAMES:
        for side, shape in (("A", (3, 7)), ("B", (8, 3))):
            key = f"base_model.model.{name}.lora_{side}.weight"
            length = math.prod(shape)
            layout[key] = {"mean": 0.1 * at, "std": 0.5 + at, "length": length, "shape": shape}
            at += 1
    (tmp_path / "layout.json").write_text(json.dumps(layout))
    return model, layout, tmp_path


def test_icm_decode(generator):
    model, layout, folder = generator
    z, condition = rand(5), rand(3, seed=1)
    flat = model(z, condition)
    assert len(flat) == 9 * 2**4
    torch.testing.assert_close(
        Decoder(folder / "cvae.safetensors", 3)(z, condition), flat, atol=1e-5, rtol=1e-4
    )
    got = decode_adapter(
        folder / "cvae.safetensors", folder / "layout.json", CONFIG, condition, z_L=z
    )
    at, tensors = 0, {}
    for key, entry in layout.items():
        piece = flat[at : at + entry["length"]] * entry["std"] + entry["mean"]
        tensors[key], at = piece.view(entry["shape"]), at + entry["length"]
    for name in NAMES:
        a, b = (tensors[f"base_model.model.{name}.lora_{s}.weight"] for s in "AB")
        want = 8 / math.sqrt(3) * b @ a
        torch.testing.assert_close(got.modules[name].delta(), want, atol=1e-4, rtol=1e-4)


def test_icm_samples_by_seed(generator):
    _, _, folder = generator
    paths = (folder / "cvae.safetensors", folder / "layout.json", CONFIG, rand(3))
    one, two, other = (decode_adapter(*paths, seed=seed) for seed in (1, 1, 2))
    assert relative(one, two) == 0
    assert relative(one, other) > 1e-3
    assert code_of(lambda: decode_adapter(*paths)) == "missing_setting"


def test_icm_layout_of_the_authors(generator):
    _, layout, folder = generator
    torch.save({**layout, "data": torch.zeros(90)}, folder / "normalized_adapter_model_9.pth")
    path = folder / "normalized_adapter_model_9.pth"
    assert code_of(lambda: read_layout(path)) == "pickle_refused"
    assert read_layout(path, allow_pickle=True) == read_layout(folder / "layout.json")


def test_icm_refuses_what_does_not_fit(generator):
    _, layout, folder = generator
    cvae, paper = folder / "cvae.safetensors", folder / "layout.json"
    call = lambda: decode_adapter(cvae, paper, CONFIG, rand(3), z_L=rand(4))  # noqa: E731
    assert code_of(call) == "bad_shape"
    assert code_of(lambda: Decoder(cvae, 8)) == "bad_shape"
    key = next(iter(layout))
    paper.write_text(json.dumps({**layout, key: {**layout[key], "length": 20}}))
    assert code_of(lambda: read_layout(paper)) == "bad_value"
    paper.write_text(json.dumps({**layout, "x": {**layout[key], "shape": [200], "length": 200}}))
    call = lambda: decode_adapter(cvae, paper, CONFIG, rand(3), seed=0)  # noqa: E731
    assert code_of(call) == "bad_shape"
    tensors = load_file(cvae)
    del tensors["decoder.1.0.weight"]
    save_file(tensors, cvae)
    assert code_of(lambda: Decoder(cvae, 3)) == "missing_tensor"


# ICM-Fusion

QUICK = Training(steps=400)


def test_fusing_one_adapter_gives_it_back():
    only = adapter(1)
    fused = fuse([only], [1.0], QUICK)
    assert relative(fused.factors, only) < 1e-5
    assert fused.reconstruction == (0.0,)


@pytest.mark.parametrize("count", [2, 3])
def test_all_weight_on_one_adapter_gives_that_one(count):
    adapters = [adapter(i) for i in range(count)]
    for i in range(count):
        weights = [float(i == j) for j in range(count)]
        fused = fuse(adapters, weights, QUICK)
        assert relative(fused.factors, adapters[i]) < 0.1
        assert max(fused.reconstruction) < 0.1


def test_fusion_is_seeded():
    adapters, weights = [adapter(0), adapter(1)], [0.3, 0.7]
    one, two = (fuse(adapters, weights, QUICK) for _ in range(2))
    assert relative(one.factors, two.factors) == 0
    other = fuse(adapters, weights, Training(steps=400, seed=5))
    assert 0 < relative(one.factors, other.factors) < 0.2


def test_fusion_leaves_the_random_stream_alone():
    torch.manual_seed(8)
    want = torch.rand(3)
    torch.manual_seed(8)
    fuse([adapter(0), adapter(1)], [0.5, 0.5], Training(steps=3))
    assert torch.equal(torch.rand(3), want)


def test_fusion_does_not_see_how_a_delta_was_factored():
    """Turning and scaling an adapter's ranks changes no delta, so it must change no result."""
    one, two = adapter(0), adapter(1)
    q = torch.linalg.qr(rand(4, 4, seed=3))[0]
    turned = Factors(
        {n: Pair(5 * q @ p.a_RK, p.b_NR @ q.T / 5) for n, p in two.modules.items()}, "tiny"
    )
    assert relative(turned, two) < 1e-5
    want = fuse([one, two], [0.5, 0.5], QUICK).factors
    assert relative(fuse([one, turned], [0.5, 0.5], QUICK).factors, want) < 1e-2


def test_alignment_changes_no_delta_and_pads_ranks():
    adapters = [adapter(0, rank=4), adapter(1, rank=2), adapter(2, rank=6)]
    for before, after in zip(adapters, align(adapters), strict=True):
        assert relative(after, before) < 1e-5
        assert after.ranks() == dict.fromkeys(NAMES, 6)


def test_fusion_refuses_what_does_not_fit():
    one = adapter(0)
    assert code_of(lambda: fuse([one, adapter(1)], [1.0])) == "bad_value"
    assert code_of(lambda: fuse([one, adapter(1, width=9)], [1.0, 1.0])) == "shape_mismatch"
    fewer = adapter(1, names=NAMES[:1])
    assert code_of(lambda: fuse([one, fewer], [1.0, 1.0])) == "setting_mismatch"


# SG-LoRA


def vowels(text):
    """A stand-in for a sentence embedder: how often each vowel occurs."""
    return torch.tensor([float(text.count(letter)) for letter in "aeiou"])


@pytest.fixture
def library(tmp_path):
    texts = {"math": "aaae", "code": "eeei", "style": "iiio", "chat": "ooou"}
    for i, name in enumerate(texts):
        save_peft(adapter(i, rank=2 + i), tmp_path / name)
    described = {name: (name, text) for name, text in texts.items()}
    return ExpertLibrary.build(described, vowels, root=tmp_path)


def test_selection_is_top_k_of_the_cosine_and_a_softmax(library):
    query = vowels("aaeeeei")
    table = torch.stack([e.embedding_H for e in library.experts])
    cosine = table @ (query / query.norm())
    found = library.select(query, k=2, temperature=0.3)
    assert list(found) == ["code", "math"]
    want = (cosine[[1, 0]] / 0.3).softmax(0)
    assert list(found.values()) == pytest.approx(want.tolist(), rel=1e-5)
    assert sum(library.select(query, k=99).values()) == pytest.approx(1)
    assert library.select(query, k=1) == {"code": 1.0}
    assert library.select(3 * query, k=2, temperature=0.3) == pytest.approx(found)


def test_equal_experts_keep_their_order(tmp_path):
    same = [LibraryEntry(name, name, "", torch.ones(3) / 3**0.5) for name in ("z", "b", "a")]
    found = ExpertLibrary(same, tmp_path).select(torch.ones(3), k=2)
    assert found == pytest.approx({"z": 0.5, "b": 0.5})


def test_generated_adapter_is_the_weighted_sum(library):
    text = "aaeeeei"
    weights = library.select(vowels(text), k=3, temperature=0.2)
    got = library.generate(text, vowels, k=3, temperature=0.2)
    experts = {name: load_factors(library.root / name) for name in weights}
    for module in NAMES:
        want = sum(w * experts[name].modules[module].delta() for name, w in weights.items())
        torch.testing.assert_close(got.modules[module].delta(), want, atol=1e-4, rtol=1e-4)
        assert got.modules[module].rank == sum(experts[n].modules[module].rank for n in weights)


def test_a_library_is_saved_and_loaded(library):
    library.save(library.root)
    again = ExpertLibrary.load(library.root)
    query = vowels("iiiaaou")
    assert again.select(query) == pytest.approx(library.select(query))
    assert relative(again.generate("iiia", vowels), library.generate("iiia", vowels)) < 1e-6


def test_a_library_reaches_no_folder_outside(library, tmp_path):
    library.save(library.root)
    table = json.loads((library.root / "library.json").read_text())
    table["code"]["folder"] = "../outside"
    (library.root / "library.json").write_text(json.dumps(table))
    again = ExpertLibrary.load(library.root)
    assert code_of(lambda: again.generate("eee", vowels, k=1)) == "path_not_allowed"


def test_a_library_refuses_nonsense(library):
    query = vowels("aei")
    assert code_of(lambda: library.select(query, k=0)) == "bad_value"
    assert code_of(lambda: library.select(query, temperature=0)) == "bad_value"
    assert code_of(lambda: library.select(query[:3])) == "bad_shape"
    assert code_of(lambda: library.select(torch.zeros(5))) == "bad_value"
    assert code_of(lambda: ExpertLibrary([])) == "bad_value"
    twice = [library.experts[0]] * 2
    assert code_of(lambda: ExpertLibrary(twice)) == "bad_value"
    assert code_of(lambda: ExpertLibrary.load(Path("nowhere"))) == "missing_file"


def test_a_real_sentence_embedder(library):
    """Descriptions pick the expert that a person would pick."""
    embed = minilm()
    texts = {
        "math": "Solves arithmetic word problems step by step",
        "code": "Writes and explains Python programs",
        "style": "Answers with ISO country codes",
        "chat": "Small talk, friendly and short",
    }
    described = {name: (name, text) for name, text in texts.items()}
    real = ExpertLibrary.build(described, embed, root=library.root)
    queries = {
        "reply only with the two-letter code of the country": "style",
        "how many apples are left if I eat three of twelve?": "math",
        "write a Python function that sorts a list": "code",
        "just chat with me a little": "chat",
    }
    for query, expert in queries.items():
        found = real.select(embed(query), k=4, temperature=0.05)
        assert next(iter(found)) == expert
        assert sum(found.values()) == pytest.approx(1)
    assert real.generate(next(iter(queries)), embed, k=2).rank == 4 + 5


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert code_of(minilm) == "missing_file"
