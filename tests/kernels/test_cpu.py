"""The CPU backend's two paths: compiled kernels and PyTorch, each against the reference."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.compiled import need_compiled
from tests.make_adapters import normal, random_module, random_spec
from vllm_lora_ext.adapters.model import RoutedModule
from vllm_lora_ext.kernels.gated_lora import (
    Site,
    StepMap,
    codes,
    gated_lora_reference,
)
from vllm_lora_ext.kernels.gated_lora.backends import choice, eager
from vllm_lora_ext.kernels.gated_lora.backends.native import build as cpu_build
from vllm_lora_ext.kernels.gated_lora.backends.native import tables as cpu_native
from vllm_lora_ext.routing import GateSpec

SLOTS, MAX_RANK = 4, 40
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
TOP2 = GateSpec(
    source="router", blocks=(3, 5, 1, 4), score="softmax", select="top_k", k=2,
    weight="renormalise",
)  # fmt: skip


@pytest.fixture(params=["compiled", "torch"])
def path(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(cpu_native, "tables", lambda *_: None)
    else:
        need_compiled()
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def build(rng, sizes, k, modules=None):
    """Slots 0, 1 and 3 with random adapters (some slices without), 2 empty; the rest is NaN."""
    site = Site(SLOTS, k, sizes, MAX_RANK, MAX_RANK, torch.float32, "cpu")
    site.reserve_routers(site.most_routers)
    for buffer in (site.a_SRK, site.router_SGK, *site.bt_SRN):
        buffer.fill_(float("nan"))
    slots = [[None] * len(sizes) for _ in range(SLOTS)]
    for slot in (0, 1, 3):
        for i, n in enumerate(sizes):
            if modules is not None:
                slots[slot][i] = modules(n)
            elif rng.random() < 0.85:
                slots[slot][i] = random_module(rng, k, n, random_spec(rng))
        site.write(slot, slots[slot])
    site.step = StepMap(80)
    return site, slots


def error(got, want):
    assert torch.isfinite(got).all()
    return ((got.float() - want).norm() / want.norm().clamp_min(1e-9)).item()


def mixed(rng, t):
    return np.array([int(rng.integers(-1, SLOTS)) for _ in range(t)])


def added(site, x_TK, n, dtype=torch.float32):
    y_TN = torch.zeros(len(x_TK), n, dtype=dtype)
    site.backend.gated_lora_(y_TN, x_TK, site)
    return y_TN


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("seed", range(24))
def test_any_gate_any_shape(path, seed, dtype):
    rng = np.random.default_rng(seed)
    k, sizes = int(rng.integers(1, 90)), tuple(rng.integers(1, 150, rng.integers(1, 4)).tolist())
    site, slots = build(rng, sizes, k)
    for t in (1, 2, int(rng.integers(3, 9)), int(rng.integers(9, 71))):
        slots_T, x_TK = mixed(rng, t), normal(rng, t, k).to(dtype)
        slots_T[0] = 0
        site.step.update(slots_T)
        if dtype is not torch.float16:  # float16 needs a processor that converts it
            assert (cpu_native.tables(site, x_TK) is not None) == (path == "compiled")
        want = gated_lora_reference(x_TK, torch.tensor(slots_T), slots, sizes)
        base_TN = normal(rng, t, sum(sizes)).to(dtype)
        y_TN = base_TN.clone()
        site.backend.gated_lora_(y_TN, x_TK, site)
        whole = want + base_TN.float()
        assert error(y_TN, whole) < TOLERANCE[dtype]
        untouched = (slots_T < 0) | (slots_T == 2)
        assert torch.equal(y_TN[untouched], base_TN[untouched])
        if dtype is torch.float32:
            assert error(added(site, x_TK, sum(sizes)), want) < TOLERANCE[dtype]


@pytest.mark.parametrize("seed", range(12))
def test_two_launches(path, seed):
    rng = np.random.default_rng(seed)
    site, slots = build(rng, (50, 9), 37)
    slots_T, x_TK = mixed(rng, 23), normal(rng, 23, 37)
    site.step.update(slots_T)
    u_PTR = site.backend.shrink(x_TK, site)
    (u_TR,) = u_PTR
    assert u_TR.shape == (23, site.num_rows)
    assert torch.isfinite(u_TR).all()
    assert not u_TR[slots_T < 0].any()
    before, y_TN = u_TR.clone(), torch.zeros(23, 59)
    site.backend.expand_(y_TN, u_PTR, site)
    want = gated_lora_reference(x_TK, torch.tensor(slots_T), slots, (50, 9))
    assert error(y_TN, want) < 2e-5
    assert torch.equal(u_TR, before)


@pytest.mark.parametrize("select", ["all", "top_k"])
def test_experts_that_share_one_a(path, select):
    rng = np.random.default_rng(5)
    gate = GateSpec(
        source="router", blocks=(6,) * 5, score="softmax", select=select,
        k=3 if select == "top_k" else 0,
    )  # fmt: skip

    def shared(n):
        return RoutedModule(normal(rng, 6, 40), normal(rng, n, 30), gate, normal(rng, 5, 40))

    site, slots = build(rng, (33, 20), 40, shared)
    for t in (1, 30):
        slots_T, x_TK = mixed(rng, t), normal(rng, t, 40)
        slots_T[0] = 1
        site.step.update(slots_T)
        want = gated_lora_reference(x_TK, torch.tensor(slots_T), slots, (33, 20))
        assert error(added(site, x_TK, 53), want) < 2e-5
        y_TN = torch.zeros(t, 53)
        site.backend.expand_(y_TN, site.backend.shrink(x_TK, site), site)
        assert error(y_TN, want) < 2e-5


def test_ties_go_to_the_lower_expert(path):
    rng = np.random.default_rng(3)
    module = random_module(rng, 70, 31, TOP2)
    module = replace(module, router_GK=module.router_GK[:1].repeat(4, 1))
    site, _slots = build(rng, (31,), 70, lambda _: module)
    site.step.update(np.zeros(9, dtype=int))
    x_TK = normal(rng, 9, 70)
    only = (module.b_NR[:, :8] @ (module.a_RK[:8] @ x_TK.t()) / 2).t()
    assert error(added(site, x_TK, 31), only) < 2e-5


def test_a_row_does_not_depend_on_its_batch_nor_on_threads(threads):
    """Bit for bit, so that a request's answer does not change with its neighbours."""
    need_compiled()
    rng = np.random.default_rng(7)
    site, _ = build(rng, (130, 70), 200, lambda n: random_module(rng, 200, n, TOP2))
    slots_T, x_TK = mixed(rng, 70), normal(rng, 70, 200)
    results = []
    for count in (1, 2, 3, 2):
        threads(count)
        site.step.update(slots_T)
        results.append(added(site, x_TK, 200))
    assert all(torch.equal(results[0], other) for other in results[1:])
    y_TN = torch.zeros(70, 200)
    site.backend.expand_(y_TN, site.backend.shrink(x_TK, site), site)
    assert torch.equal(results[0], y_TN)
    for row in range(0, 70, 3):
        site.step.update(slots_T[row : row + 1])
        assert torch.equal(added(site, x_TK[row : row + 1], 200)[0], results[0][row])


def test_a_poisoned_request_stays_alone(path):
    rng = np.random.default_rng(8)
    site, _ = build(rng, (40,), 64, lambda n: random_module(rng, 64, n, TOP2))
    slots_T, x_TK = np.array([0, 0, 3, 0, -1, 1]), normal(rng, 6, 64)
    site.step.update(slots_T)
    clean = added(site, x_TK, 40)
    x_TK[1] = float("nan")
    dirty, others = added(site, x_TK, 40), [0, 2, 3, 4, 5]
    torch.testing.assert_close(dirty[others], clean[others])
    assert dirty[1].isnan().all()


def test_views_of_larger_tensors(path):
    """Rows that are further apart than they are long; columns apart go to the PyTorch path."""
    rng = np.random.default_rng(9)
    site, slots = build(rng, (20,), 30, lambda n: random_module(rng, 30, n, TOP2))
    site.step.update(np.array([0, 1, 3]))
    x_TK = normal(rng, 3, 30)
    want = gated_lora_reference(x_TK, torch.tensor([0, 1, 3]), slots, (20,))
    wide = torch.zeros(3, 57)
    site.backend.gated_lora_(wide[:, 7:27], torch.cat([x_TK, x_TK], 1)[:, 30:], site)
    assert error(wide[:, 7:27], want) < 2e-5
    assert not wide[:, :7].any()
    assert not wide[:, 27:].any()
    turned = torch.zeros(20, 3)
    site.backend.gated_lora_(turned.t(), x_TK.t().contiguous().t(), site)
    assert error(turned.t(), want) < 2e-5


def broken_library(monkeypatch, tmp_path, **environment):
    """`cpu_build.library` in another environment, with a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return cpu_build.library.__wrapped__()


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", ""])
def test_without_a_compiler_the_numbers_are_the_same(monkeypatch, tmp_path, caplog, compiler):
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.WARNING):
        if compiler:
            found = broken_library(monkeypatch, tmp_path, CXX=compiler)
        else:
            found = broken_library(monkeypatch, tmp_path, PATH=str(tmp_path))
    assert found is None
    assert "PyTorch path is used" in caplog.text
    rng = np.random.default_rng(4)
    site, _slots = build(rng, (50,), 64, lambda n: random_module(rng, 64, n, TOP2))
    site.step.update(mixed(rng, 12))
    x_TK = normal(rng, 12, 64)
    with_compiler = added(site, x_TK, 50)
    monkeypatch.setattr(cpu_build, "library", lambda: None)
    assert choice.without_triton("cpu") is choice.best("cpu") is eager
    site.backend = eager
    without = added(site, x_TK, 50)
    torch.testing.assert_close(with_compiler, without, rtol=1e-5, atol=1e-6)


def test_a_cache_folder_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    folder = cpu_build.cache_folder()
    assert folder.is_dir()
    assert folder.stat().st_mode & 0o077 == 0


def test_processes_that_start_together_build_once(tmp_path):
    need_compiled()
    code = (
        "from vllm_lora_ext.kernels.gated_lora.backends.native import build as cpu_build\n"
        "build = cpu_build._build\n"
        "cpu_build._build = lambda *a: (print('built'), build(*a))\n"
        "print(cpu_build.library().has_float16())"
    )
    command = [sys.executable, "-c", code]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    workers = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    answers = [worker.communicate(timeout=300)[0] for worker in workers]
    assert all(worker.returncode == 0 for worker in workers)
    assert "".join(answers).count("built") == 1
    assert len(list((tmp_path / "vllm-lora-ext").glob("*.so"))) == 1


def test_c_serves_every_choice_of_the_gate_table():
    """Its names come from `codes`; which of them it has code for, it says itself."""
    need_compiled()
    assert cpu_native.known_codes() == tuple(map(len, (codes.SCORES, codes.SELECTS, codes.WEIGHTS)))


def test_a_gate_that_the_kernels_do_not_know_runs_on_pytorch(monkeypatch, caplog):
    """With one line in the log, and the right numbers; never an error in a forward."""
    need_compiled()
    logging.getLogger("vllm").propagate = True  # vLLM turns it off once it is imported
    monkeypatch.setattr(cpu_native, "known_codes", lambda: (2, 4, 5))
    cpu_native._say_unknown.cache_clear()
    gate = GateSpec(source="router", blocks=(3, 5), score="sigmoid")
    rng = np.random.default_rng(4)
    with caplog.at_level(logging.WARNING, "vllm.lora_ext"):
        for _ in range(2):
            site, slots = build(rng, (33,), 40, lambda n: random_module(rng, 40, n, gate))
            slots_T, x_TK = mixed(rng, 12), normal(rng, 12, 40)
            site.step.update(slots_T)
            want = gated_lora_reference(x_TK, torch.tensor(slots_T), slots, (33,))
            assert error(added(site, x_TK, 33), want) < 2e-5
    (record,) = set(caplog.records)
    assert "sigmoid" in record.getMessage() and "PyTorch" in record.getMessage()
