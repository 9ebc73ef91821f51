"""What must hold before `merging_speed.py` times anything: the same numbers as the tools'."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from merging_ways import (
    RANK,
    WEIGHTS,
    deltas,
    empty_model,
    like_mergekit,
    like_peft,
    make_adapters,
    merge_by_peft,
    merge_here,
)
from safetensors.torch import load_file

SIDE = Path(__file__).with_name("mergekit_side.py")
Q = "self_attn.q_proj"
SMALL = {Q: (48, 40), "mlp.down_proj": (56, 48)}  # of mergekit_side.small_llama
LIKE_PEFT: dict[str, dict[str, Any]] = {
    "cat": {}, "linear": {}, "ties": {"density": 0.2}, "dare_ties": {"density": 0.5},
    "dare_linear": {"density": 0.5}, "magnitude_prune": {"density": 0.5},
}  # fmt: skip
DENSE_LIKE_PEFT: dict[str, dict[str, Any]] = {
    "svd": {"svd_rank": RANK}, "ties_svd": {"density": 0.2, "svd_rank": RANK},
    "magnitude_prune_svd": {"density": 0.5, "svd_rank": RANK},
}  # fmt: skip
LIKE_MERGEKIT: dict[str, dict[str, Any]] = {
    "task_arithmetic": {}, "ties": {"density": 0.2}, "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5}, "della": {"density": 0.5, "epsilon": 0.1},
    "breadcrumbs": {"density": 0.5, "gamma": 0.01},
}  # fmt: skip


def differences(
    mine: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]
) -> list[float]:
    """Relative distances of the modules' deltas."""
    return [float((mine[name] - d).norm() / d.norm()) for name, d in theirs.items()]


def passed(tool: str, kinds: int, found: list[float]) -> None:
    """Raises SystemExit unless the differences are rounding."""
    wrong = [x for x in found if not x < 1e-4]  # NaN is wrong, too
    if wrong or not found:
        raise SystemExit(f"check failed: merges differ from {tool}'s by {wrong}")
    print(f"check passed: {kinds} kinds equal {tool}'s to {max(found):.0e}", flush=True)


def without_chance(method: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Random masks of another tool cannot be repeated: compared where nothing is dropped."""
    drawn = method.startswith(("dare", "della"))
    return {**parameters, "density": 1.0} if drawn else dict(parameters)


def check_peft(root: Path) -> None:
    """Ours with compat equals PEFT on small adapters."""
    folders = make_adapters(root / "small", SMALL, 2, torch.float32)
    found: list[float] = []
    for method, given in (LIKE_PEFT | DENSE_LIKE_PEFT).items():
        parameters = without_chance(method, given)
        mine, theirs = root / f"{method}-mine", root / f"{method}-peft"
        merge_here(folders, mine, *like_peft(method, parameters))
        merge_by_peft(folders, theirs, method, parameters, empty_model(SMALL, 2))
        found += differences(deltas(mine), deltas(theirs / "merged"))
    passed("PEFT", len(LIKE_PEFT | DENSE_LIKE_PEFT), found)


def check_mergekit(python: str, root: Path) -> dict[str, Any]:
    """Ours with compat equals mergekit's commands and the linear that is timed; its versions."""
    methods = {method: without_chance(method, p) for method, p in LIKE_MERGEKIT.items()}
    folders = make_adapters(root / "small", SMALL, 2, torch.float32)
    versions = by_mergekit(python, {
        "what": "check", "root": str(root), "folders": [str(f) for f in folders],
        "weights": WEIGHTS, "rank": RANK, "shapes": SMALL, "linear": Q, "methods": methods,
    })  # fmt: skip
    base = load_file(root / "base/model.safetensors")
    found: list[float] = []
    for method, parameters in methods.items():
        ours, given = like_mergekit(method, parameters)
        merge_here(folders, root / f"{method}-cut", ours, given)
        merge_here(folders, root / f"{method}-whole", ours, {**given, "rank": 4 * RANK})
        whole, cut = deltas(root / f"{method}-whole"), deltas(root / f"{method}-cut")
        merged = load_file(root / f"{method}-merged/model.safetensors")
        theirs = {name: merged[f"{name}.weight"] - base[f"{name}.weight"] for name in whole}
        found += differences(whole, theirs)
        found += differences(cut, deltas(root / f"{method}-extracted"))
        found += differences(cut, deltas(root / f"{method}-linear"))
    passed("mergekit", len(methods), found)
    return versions


def by_mergekit(python: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """A job of mergekit_side.py."""
    return answer([python, str(SIDE), json.dumps(job)], f"mergekit {job['what']}")


def answer(line: list[str], what: str) -> dict[str, Any]:
    """The JSON that a process prints last. Raises SystemExit."""
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{what} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
