"""What is this machine, and are vLLM's own kernels, the plugin and its kernels right here?

    python scripts/gpu/probe.py [--out FILE.json]

Prints a line per check; what fails does not stop the next. Exit code: 0 all is right, 1 a check
failed, 3 there is no GPU that torch can use.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))

import facts

NO_GPU = 3
Check = tuple[str, Callable[[], object]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    missing = no_gpu()
    if missing is not None:
        print(f"no GPU: {missing}")
        return NO_GPU
    import torch

    torch.manual_seed(0)
    found: dict[str, Any] = {"machine": machine(), "checks": {}}
    print(json.dumps(found["machine"]))
    for name, seconds, text, right in run_checks(CHECKS):
        print(f"{name:16} {seconds:5.1f} s  {'' if right else 'FAILED: '}{text}", flush=True)
        found["checks"][name] = {"right": right, "text": text, "seconds": round(seconds, 1)}
        if args.out is not None:
            args.out.write_text(json.dumps(found, indent=1) + "\n")
    failed = [name for name, check in found["checks"].items() if not check["right"]]
    print("all right" if not failed else "failed: " + ", ".join(failed))
    return int(bool(failed))


def no_gpu() -> str | None:
    """Why there is no GPU to run on, in one line; None: there is one."""
    if find_spec("torch") is None:
        return "torch is not installed for this Python; pip install 'vllm-lora-ext[cuda]'"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    return None


def machine() -> dict[str, Any]:
    """Card, driver, and the versions of all that has a say in a result."""
    import torch

    versions = facts.versions() | {"cuda": torch.version.cuda}
    card, driver, used, clock = facts.ask_driver()
    major, minor = torch.cuda.get_device_capability()
    return {
        "card": card or torch.cuda.get_device_name(), "driver": driver, "memory_used": used,
        "clock_now": clock, "capability": f"sm_{major}{minor}", "versions": versions,
    }  # fmt: skip


def run_checks(checks: Iterable[Check]) -> Iterable[tuple[str, float, str, bool]]:
    """Name, seconds, what was found, and whether it is right."""
    for name, check in checks:
        start = time.monotonic()
        try:
            text, right = str(check()), True
        except Exception as error:  # whatever it is, the next check still runs
            lines = str(error).strip()[:300] or "no message"
            text, right = f"{type(error).__name__}: {lines}", False
        yield name, time.monotonic() - start, text, right


# --- vLLM by itself: what fails here is not the plugin's ------------------------------------------


def imports() -> str:
    import vllm
    from vllm import LLM  # noqa: F401
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    if not current_platform.is_cuda():
        raise RuntimeError(f"vLLM runs on {type(current_platform).__name__}, not on the GPU")
    if not HAS_TRITON:
        raise RuntimeError("vLLM finds no working Triton")
    return f"vllm {vllm.__version__}, {type(current_platform).__name__}"


def norm() -> str:
    import torch
    from vllm import _custom_ops as ops

    x, w = normal(33, 4096), normal(4096)
    out = torch.empty_like(x)
    ops.rms_norm(out, x, w, 1e-5)
    f = x.float()
    return close(out, f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-5) * w.float())


def activation() -> str:
    import torch
    import vllm._custom_ops  # noqa: F401  registers the op

    x = normal(33, 2 * 14336)
    out = x.new_empty(33, 14336)
    torch.ops._C.silu_and_mul(out, x)
    a, b = x.float().chunk(2, dim=-1)
    return close(out, torch.nn.functional.silu(a) * b)


def rotary() -> str:
    import torch
    from vllm import _custom_ops as ops

    q, k, at = normal(33, 32 * 128), normal(33, 8 * 128), torch.arange(33, device="cuda")
    angles = at[:, None].float() * (1e4 ** -(torch.arange(64, device="cuda") / 64))[None]
    cache = torch.cat([angles.cos(), angles.sin()], dim=1).to(q.dtype)
    a, b = q.float().view(33, 32, 2, 64).unbind(2)
    cos, sin = cache.float()[:, None].chunk(2, dim=-1)
    want = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=2).reshape(33, -1)
    ops.rotary_embedding(at, q, k, 128, cache, True)
    return close(q, want)


def kv_cache() -> str:
    import torch
    from vllm import _custom_ops as ops

    k, v = normal(40, 8, 128), normal(40, 8, 128)
    keys, values = torch.zeros(2, 10, 16, 8, 128, dtype=k.dtype, device="cuda")
    slots, one = torch.randperm(160, device="cuda")[:40], torch.ones(1, device="cuda")
    ops.reshape_and_cache_flash(k, v, keys, values, slots, "auto", one, one)
    if not torch.equal(keys.view(160, 8, 128)[slots], k):
        raise RuntimeError("keys differ")
    if not torch.equal(values.view(160, 8, 128)[slots], v):
        raise RuntimeError("values differ")
    return "the same bits"


def flash() -> str:
    """The newest FlashAttention that loads; full CUDA graphs want version 3."""
    import torch
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    number = get_flash_attn_version()
    q, k, v = (normal(100, n, 128) for n in (8, 2, 2))
    ends = torch.tensor([0, 100], dtype=torch.int32, device="cuda")
    out = flash_attn_varlen_func(q, k, v, max_seqlen_q=100, cu_seqlens_q=ends, max_seqlen_k=100,
                                 cu_seqlens_k=ends, causal=True, fa_version=number)  # fmt: skip
    want = torch.nn.functional.scaled_dot_product_attention(
        *(t.float().transpose(0, 1)[None] for t in (q, k, v)), is_causal=True, enable_gqa=True
    )
    return f"version {number}, {close(out, want[0].transpose(0, 1))}"


def stock_lora() -> str:
    import torch
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    t, k, n, rank = 33, 512, 192, 16
    meta = LoRAKernelMeta.make(1, t, device="cuda")
    meta.prepare_tensors(torch.zeros(t, dtype=torch.int32, device="cuda"))
    args = meta.meta_args(t, False)
    a, b, x = normal(1, 1, rank, k), normal(1, 1, n, rank), normal(t, k)
    u, y = torch.zeros(1, t, rank, device="cuda"), torch.zeros(t, n, dtype=x.dtype, device="cuda")
    lora_shrink(x, (a,), u, *args, 1.0)
    lora_expand(u, (b,), y, *args, offset_start=0, add_inputs=True)
    return close(y, x.float() @ a[0, 0].float().t() @ b[0, 0].float().t())


# --- the plugin -----------------------------------------------------------------------------------


def plugin() -> str:
    from vllm.plugins import load_general_plugins

    from vllm_lora_ext.model_patches import check

    load_general_plugins()
    root = check.installed_root()
    wrong = [] if root is None else [f for f in check.check_tree(root) if f.state != "ok"]
    if wrong:
        raise RuntimeError(f"{len(wrong)} patch targets differ, the first: {wrong[0].target}")
    import vllm.v1.worker.lora_model_runner_mixin as mixin

    if not mixin.LRUCacheWorkerLoRAManager.__module__.startswith("vllm_lora_ext."):
        raise RuntimeError("vLLM did not load the plugin: see `vllm-lora-ext doctor`")
    return "every patch fits, vLLM has loaded it"


def same_sources(root: Path | None = None, repo: Path = facts.REPO) -> str:
    """The engines and servers run what is installed, the kernel tests what lies in the checkout.

    Args:
        root: of the installed package; by default the one that is imported.
    """
    if root is None:
        spec = find_spec(facts.PACKAGE)
        if spec is None or spec.origin is None:
            raise RuntimeError("vllm-lora-ext is not installed for this Python")
        root = Path(spec.origin).resolve().parent
    if root == repo / facts.PACKAGE:
        return "the checkout itself is installed"
    here, there = facts.of_checkout(repo), facts.of_package(root)
    other = sorted(
        name for name in here.keys() | there.keys()
        if name not in here or name not in there
        or here[name].read_text("utf-8") != there[name].read_text("utf-8")
    )  # fmt: skip
    if other:
        raise RuntimeError(
            f"the installed package is not this checkout: {len(other)} files differ, {other[0]}"
            f" first; numbers would be of one and tests of the other: pip install {repo}"
        )
    return f"installed as in the checkout, {facts.digest(here)}"


def linears() -> str:
    from vllm_lora_ext.kernels.gated_lora.selfcheck import selfcheck

    return _selfcheck(selfcheck)


def blocks() -> str:
    from vllm_lora_ext.kernels.mix_mlp.selfcheck import selfcheck

    return _selfcheck(selfcheck)


def _selfcheck(selfcheck: Callable[..., str | None]) -> str:
    import torch

    for dtype, rank in ((torch.bfloat16, 128), (torch.float32, 64), (torch.bfloat16, 16)):
        wrong = selfcheck("cuda:0", dtype, rank, 64)
        if wrong is not None:
            raise RuntimeError(wrong)
    return "right in bf16 and fp32, ranks 16, 64 and 128"


def tests_can_run() -> str:
    if find_spec("pytest") is None:
        raise RuntimeError("pytest is not installed: the stage `kernels` cannot run")
    return "pytest is there"


CHECKS: tuple[Check, ...] = (
    ("imports", imports), ("rms norm", norm), ("silu_and_mul", activation), ("rotary", rotary),
    ("kv cache", kv_cache), ("flash attention", flash), ("stock lora", stock_lora),
    ("sources", same_sources), ("plugin", plugin), ("kernels", linears),
    ("block kernel", blocks), ("tests", tests_can_run),
)  # fmt: skip


def normal(*shape: int) -> Any:
    import torch

    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def close(got: Any, want: Any, bound: float = 2e-2) -> str:
    error = float((got.float() - want.float()).norm() / want.float().norm())
    if not error < bound:  # NaN is not smaller
        raise RuntimeError(f"differs by {error:.1e} of its norm")
    return f"differs by {error:.1e} of its norm"


if __name__ == "__main__":
    sys.exit(main())
