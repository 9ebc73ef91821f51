"""Every conversion against PEFT itself: random adapters of each tuner, dense deltas compared."""

from __future__ import annotations

import json

import peft
import pytest
import torch

from vllm_lora_ext.adapters import FORMATS, load_adapter
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.factors import load_factors, save_peft
from vllm_lora_ext.merging.variants import read_variant

ALL = ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]
pytestmark = pytest.mark.filterwarnings("ignore")


def ada(**more):
    return peft.AdaLoraConfig(
        init_r=5, target_r=3, r=8, lora_alpha=12, total_step=10, target_modules=ALL, **more
    )


EXACT = {
    "adalora": ("adalora", ada()),
    "adalora_alpha_0": ("adalora", peft.AdaLoraConfig(
        init_r=5, lora_alpha=0, total_step=9, target_modules=["v_proj"])),
    "loha": ("loha", peft.LoHaConfig(
        r=3, alpha=5, target_modules=ALL, rank_pattern={"up_proj": 2},
        alpha_pattern={"k_proj": 9})),
    "loha_full_rank": ("loha", peft.LoHaConfig(r=7, alpha=2, target_modules=["k_proj", "o_proj"])),
    "lokr": ("lokr", peft.LoKrConfig(r=2, alpha=3, target_modules=ALL)),
    "lokr_both": ("lokr", peft.LoKrConfig(
        r=2, alpha=3, decompose_both=True, decompose_factor=6, target_modules=ALL)),
    "lokr_full": ("lokr", peft.LoKrConfig(
        r=40, alpha=3, decompose_factor=4, target_modules=ALL, rank_pattern={"k_proj": 3})),
    "vera": ("vera", peft.VeraConfig(r=5, target_modules=ALL)),
    "vera_drawn": ("vera", peft.VeraConfig(
        r=5, save_projection=False, projection_prng_key=91, target_modules=ALL)),
    "vblora": ("vblora", peft.VBLoRAConfig(
        r=5, num_vectors=11, vector_length=12, topk=3, target_modules=ALL)),
    "vblora_topk": ("vblora", peft.VBLoRAConfig(
        r=3, num_vectors=300, vector_length=4, topk=2, save_only_topk_weights=True,
        target_modules=ALL)),
    "vblora_top1": ("vblora", peft.VBLoRAConfig(
        r=3, num_vectors=7, vector_length=4, topk=1, target_modules=ALL)),
    "delora": ("delora", peft.DeloraConfig(
        r=5, delora_lambda=7, target_modules=ALL, rank_pattern={"o_proj": 3})),
    "miss": ("miss", peft.MissConfig(r=7, target_modules=ALL)),
    "miss_mini": ("miss", peft.MissConfig(r=6, mini_r=4, init_weights="mini", target_modules=ALL)),
    "gralora": ("gralora", peft.GraloraConfig(
        r=6, gralora_k=3, alpha=5, target_modules=["q_proj", "up_proj"])),
    "gralora_hybrid": ("gralora", peft.GraloraConfig(
        r=4, gralora_k=2, hybrid_r=3, alpha=5, target_modules=ALL)),
    "fourierft": ("fourierft", peft.FourierFTConfig(
        n_frequency=13, scaling=70.0, random_loc_seed=5, target_modules=ALL)),
    "fourierft_pattern": ("fourierft", peft.FourierFTConfig(
        n_frequency=200, n_frequency_pattern={"o_proj": 3}, target_modules=ALL)),
    "pvera": ("pvera", peft.PveraConfig(r=5, target_modules=ALL)),
    "unilora": ("unilora", peft.UniLoraConfig(
        r=5, theta_d_length=37, save_indices=True, target_modules=ALL)),
    "hra": ("hra", peft.HRAConfig(r=5, target_modules=ALL)),
    "hra_gs": ("hra", peft.HRAConfig(r=5, apply_GS=True, target_modules=ALL)),
}  # fmt: skip
FULL = {
    "c3a": ("c3a", peft.C3AConfig(block_size=6, target_modules=ALL)),
    "randlora": ("randlora", peft.RandLoraConfig(r=5, randlora_alpha=3, target_modules=ALL)),
    "randlora_sparse": ("randlora", peft.RandLoraConfig(r=7, sparse=True, target_modules=ALL)),
    "hira": ("hira", peft.HiraConfig(r=3, target_modules=ALL)),
    "ia3": ("ia3", peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "dora": ("dora", peft.LoraConfig(r=5, lora_alpha=9, use_dora=True, target_modules=ALL)),
    "dora_rslora": ("dora", peft.LoraConfig(
        r=5, lora_alpha=9, use_dora=True, use_rslora=True, rank_pattern={"o_proj": 2},
        target_modules=["q_proj", "o_proj"])),
    "miss_bat": ("miss_bat", peft.MissConfig(
        r=6, init_weights="bat", target_modules=["q_proj", "k_proj", "down_proj"])),
}  # fmt: skip
NEEDS_INTS = ("vblora_topk",)


def trained(model, config, seed=0):
    """The model with every trainable tensor of the adapter random, and AdaLoRA's E partly 0."""
    tuned = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, weight in tuned.named_parameters():
        if not weight.requires_grad:
            continue
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
        if "magnitude" in name or "ia3_l" in name or "delora_lambda" in name:
            weight.add_(1)
        if "lora_E" in name:
            weight[::3] = 0
    return tuned


def dense_deltas(tuned, make_base):
    """Module → [out, in], from the forward of each tuned layer on the identity."""
    found = {}
    for name, layer in make_base().named_modules():
        if isinstance(layer, torch.nn.Linear):
            now = tuned.base_model.model.get_submodule(name)
            eye = torch.eye(layer.in_features)
            delta = (now(eye) - layer(eye)).T
            if float(delta.abs().max()) > 0:
                found[name] = delta
    return found


def worst(factors, want):
    assert set(factors.modules) == set(want)
    return max(
        float((factors.modules[name].delta() - delta).norm() / delta.norm())
        for name, delta in want.items()
    )


@pytest.mark.parametrize("case", EXACT)
def test_exact_ones(case, make_base, base_dir, tmp_path):
    system, config = EXACT[case]
    tuned = trained(make_base(), config)
    tuned.save_pretrained(tmp_path / "adapter")
    want = dense_deltas(tuned, make_base)
    assert want
    got = read_variant(tmp_path / "adapter", base=base_dir)
    assert (got.system, got.exact, got.error) == (system, True, None)
    assert worst(got.factors, want) < 2e-5
    save_peft(got.factors, tmp_path / "plain")
    assert worst(load_factors(tmp_path / "plain"), want) < 2e-5


AS_THEY_ARE = {row.name for row in FORMATS if row.status == "served"}
SERVED = [c for c, (system, _) in EXACT.items() if system in AS_THEY_ARE and c not in NEEDS_INTS]


@pytest.mark.parametrize("case", SERVED)
def test_served_ones_need_no_conversion(case, make_base, tmp_path):
    """The families that have a reader are loaded as they are; sizes come from the sidecar."""
    reader = next(row for row in FORMATS if row.name == EXACT[case][0])
    model = make_base()
    sizes = {
        name: [layer.in_features, layer.out_features]
        for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)
    }  # fmt: skip
    tuned = trained(model, EXACT[case][1])
    tuned.save_pretrained(tmp_path)
    if "sizes" in reader.settings:
        with pytest.raises(AdapterError) as refused:
            load_adapter(tmp_path)
        assert refused.value.code == "missing_setting"
        (tmp_path / "routing.json").write_text(json.dumps({"sizes": sizes}))
    adapter = load_adapter(tmp_path)
    assert adapter.system == reader.name
    want = dense_deltas(tuned, make_base)
    assert set(adapter.modules) == set(want)
    for name, module in adapter.modules.items():
        torch.testing.assert_close(module.b_NR @ module.a_RK, want[name], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("case", FULL)
def test_full_rank_ones(case, make_base, base_dir, tmp_path):
    """Exact at full rank; at a smaller one as good as the best of that rank, its error stated."""
    system, config = FULL[case]
    tuned = trained(make_base(), config)
    tuned.save_pretrained(tmp_path)
    want = dense_deltas(tuned, make_base)
    with pytest.raises(AdapterError) as refused:
        read_variant(tmp_path, base=base_dir)
    assert refused.value.code == "missing_setting"
    whole = read_variant(tmp_path, base=base_dir, rank=48)
    assert (whole.system, whole.exact) == (system, True)
    assert worst(whole.factors, want) < 2e-5
    some = read_variant(tmp_path, base=base_dir, rank=9)
    assert not some.exact and some.factors.rank == 9
    for name, delta in want.items():
        s = torch.linalg.svdvals(delta.double())
        best = float(s[9:].norm() / s.norm())
        seen = float((some.factors.modules[name].delta() - delta).norm() / delta.norm())
        assert seen == pytest.approx(best, rel=1e-3, abs=1e-5)
        assert some.error[name] == pytest.approx(best, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("case", ["dora", "dora_rslora", "ia3"])
def test_multipliers_are_exact(case, make_base, base_dir, tmp_path):
    tuned = trained(make_base(), FULL[case][1])
    tuned.save_pretrained(tmp_path)
    got = read_variant(tmp_path, base=base_dir, multipliers=True)
    assert got.exact
    plain = make_base()
    for name, pair in got.factors.modules.items():
        layer = plain.get_submodule(name)
        x_TK = torch.randn(9, layer.in_features)
        g = (got.out_scale or {}).get(name, torch.ones(layer.out_features))
        g_in = (got.in_scale or {}).get(name, torch.ones(layer.in_features))
        y = g * (layer(g_in * x_TK) + x_TK @ pair.a_RK.T @ pair.b_NR.T)
        want = tuned.base_model.model.get_submodule(name)(x_TK)
        torch.testing.assert_close(y, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["pissa", "olora", "pissa_niter_4"])
@pytest.mark.parametrize("rslora", [False, True])
def test_rebased(kind, rslora, make_base, base_dir, tmp_path):
    config = peft.LoraConfig(
        r=5, lora_alpha=7, init_lora_weights=kind, target_modules=["q_proj", "down_proj"],
        use_rslora=rslora,
    )  # fmt: skip
    tuned = peft.get_peft_model(make_base(), config).eval()
    tuned.save_pretrained(tmp_path / "init")
    generator = torch.Generator().manual_seed(1)
    for name, weight in tuned.named_parameters():
        if "lora_" in name:
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    tuned.save_pretrained(tmp_path / "trained")
    want = dense_deltas(tuned, make_base)
    got = read_variant(tmp_path / "trained", init=tmp_path / "init")
    assert got.exact and got.factors.rank == 10
    assert worst(got.factors, want) < 2e-5
    if kind == "pissa_niter_4":
        with pytest.raises(AdapterError) as refused:
            read_variant(tmp_path / "trained", base=base_dir)
        assert refused.value.code == "missing_setting"
    else:
        recomputed = read_variant(tmp_path / "trained", base=base_dir)
        assert worst(recomputed.factors, want) < 2e-5


def test_loftq_says_what_it_leaves_out(make_base, tmp_path):
    """PEFT trains it over a rounded base, which no file of the adapter has."""
    for name in ("init", "trained"):
        config = peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False)
        peft.get_peft_model(make_base(), config).save_pretrained(tmp_path / name)
        file = tmp_path / name / "adapter_config.json"
        said = json.loads(file.read_text()) | {"init_lora_weights": "loftq"}
        file.write_text(json.dumps(said))
    got = read_variant(tmp_path / "trained", init=tmp_path / "init")
    assert got.factors.rank == 6 and "quantised base" in got.notes[0]


def test_a_smaller_rank_cuts_an_exact_one(make_base, tmp_path):
    tuned = trained(make_base(), peft.LoHaConfig(r=4, alpha=3, target_modules=["q_proj"]))
    tuned.save_pretrained(tmp_path)
    want = dense_deltas(tuned, make_base)
    got = read_variant(tmp_path, rank=6)
    for name, delta in want.items():
        s = torch.linalg.svdvals(delta.double())
        assert got.error[name] == pytest.approx(float(s[6:].norm() / s.norm()), rel=1e-3)
        assert got.factors.modules[name].rank == 6


REFUSED = {
    "oft": lambda: peft.OFTConfig(r=4, oft_block_size=0, target_modules=["q_proj"]),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"]),
    "shira": lambda: peft.ShiraConfig(r=2, target_modules=["q_proj"]),
    "waveft": lambda: peft.WaveFTConfig(n_frequency=9, target_modules=["q_proj"]),
    "ln_tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case, make_base, base_dir, tmp_path):
    peft.get_peft_model(make_base(), REFUSED[case]()).save_pretrained(tmp_path)
    with pytest.raises(AdapterError) as refused:
        read_variant(tmp_path, base=base_dir, rank=8)
    assert refused.value.code == "unsupported_feature"
    reader = next(row for row in FORMATS if row.name == case)
    assert reader.refused in refused.value.text
    with pytest.raises(AdapterError) as by_the_server:
        load_adapter(tmp_path)
    assert by_the_server.value.text == refused.value.text
