"""Formats that a request completes, one thing changed: a typed error, or what the files say.

As `test_fuzz_formats`, whose changes these are; what loads is compared with the formulas of
`tests/make_conditioned.py`, for a user, an instruction or columns drawn at random.
"""

from __future__ import annotations

from functools import cache

import make_conditioned as make
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from make_adapters import normal
from safetensors.torch import load_file

from tests.adapters import test_fuzz_formats as fuzz
from tests.adapters.conftest import load_base
from vllm_lora_ext.adapters import check_fits, load_adapter
from vllm_lora_ext.adapters.hf import delta_reference, model_shapes
from vllm_lora_ext.errors import AdapterError

TOKENS = 3
CHANGES = [c for c in fuzz.CHANGES if c not in (fuzz.add_another_format, fuzz.swap_weights)]
# Left away, these leave a good folder.
OPTIONAL = {"system", "head_size"}
# Without them, an adapter acts everywhere, or is scaled otherwise, as in PEFT.
DEFAULTS = {"alora_invocation_tokens": None, "use_rslora": False}


@pytest.fixture(scope="module")
def mha():
    return load_base(make.BASE)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """(format, seed) → folder."""
    root = tmp_path_factory.mktemp("good")
    return cache(lambda name, seed: make.write_random(name, root / f"{name}-{seed}", seed))


def some(adapter, seed=0):
    """What a request brings for an adapter."""
    rng, user = np.random.default_rng(seed), adapter.template and adapter.template.user
    rows_TC = (normal(rng, TOKENS, max(1, len(adapter.columns))) > 0).float()
    return make.Given(rows_TC, normal(rng, user or 1), normal(rng, 5, make.HIDDEN))


def ready(adapter, request):
    """The adapter that serves the request."""
    template = adapter.template
    if template is None:
        return adapter
    if not template.instruction:
        return template.derive(request.user_N, None)
    pooling = template.pooling()
    for part in request.hidden_TK.split(2):
        pooling.add(part)
    return template.derive(None, pooling.gate())


def assert_is_what_the_files_say(folder, adapter):
    request, rng = some(adapter), np.random.default_rng(1)
    made = ready(adapter, request)
    assert set(made.modules) == make.Files(folder).layers()
    if adapter.template is not None:
        assert {n: m.a_RK.shape[1] for n, m in made.modules.items()} == {
            n: sizes[0] for n, sizes in adapter.template.sizes.items()
        }
        assert max(m.rank for m in made.modules.values()) == adapter.template.rank
    for name, module in made.modules.items():
        x_TK = normal(rng, TOKENS, module.a_RK.shape[1])
        want_TN = make.delta(folder, name, x_TK, request)
        got_TN = delta_reference(module, x_TK, request.rows_TC).double()
        fuzz.assert_close(got_TN, want_TN, name)


@pytest.mark.parametrize("name", make.FORMATS)
def test_the_good_ones_are_what_their_files_say(name, good, mha):
    for seed in range(8):
        adapter = load_adapter(good(name, seed), head_size=make.HEAD)
        check_fits(adapter, model_shapes(mha), torch.float32)
        assert_is_what_the_files_say(good(name, seed), adapter)


@pytest.mark.parametrize("name", make.FORMATS)
@fuzz.PROFILE
@given(data=st.data())
def test_one_change(name, data, good, mha, tmp_path):
    folder = good(name, data.draw(st.integers(0, 4)))
    change = fuzz.Change(data, folder, tmp_path / "changed", name)
    data.draw(st.sampled_from(CHANGES))(change)
    try:
        adapter = load_adapter(change.folder, head_size=make.HEAD)
        check_fits(adapter, model_shapes(mha), torch.float32)
        made = ready(adapter, some(adapter))
    except AdapterError as error:
        assert error.code in fuzz.CODES
        assert "fix: " in error.text and len(error.text) < 2500, error.text
        return
    files, before = make.Files(change.folder), make.Files(folder)
    told = set(before.settings) - set(files.settings) <= OPTIONAL
    told &= all(files.config.get(k, v) == before.config.get(k, v) for k, v in DEFAULTS.items())
    if change.outcome == fuzz.SAME and told:
        want = load_adapter(folder, head_size=make.HEAD)
        assert (adapter.columns, adapter.system) == (want.columns, want.system)
        assert not fuzz.differing(made, ready(want, some(want)))
    assert_is_what_the_files_say(change.folder, adapter)


@pytest.mark.parametrize("name", ["reclora_ctr", "reclora_token", "wavllm"])
def test_a_lost_layer_is_missed(name, good, tmp_path):
    """All layers but one have it: whatever was lost is missed, one tensor or all of a layer's."""
    folder = next(good(name, s) for s in range(9) if _depth(good(name, s)) == 3)
    tensors = load_file(next(folder.glob("*.safetensors")))
    stem = next(n for n in tensors if ".1." in n).split(".1.")[0] + ".1."
    change = fuzz.Change(None, folder, tmp_path / "changed", name)
    fuzz.save(
        {n: t for n, t in tensors.items() if not n.startswith(stem)},
        next(change.folder.glob("*.safetensors")),
    )
    with pytest.raises(AdapterError) as caught:
        load_adapter(change.folder)
    assert caught.value.code == "missing_tensor"


def _depth(folder):
    return 1 + max(int(name.split(".")[2]) for name in make.Files(folder).layers())
