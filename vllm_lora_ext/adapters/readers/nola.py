"""NOLA (arXiv 2310.02556): A and B are a frozen matrix plus a combination of random ones.

    A = A_0 + 1/sqrt(k) · sum_b c_b U_b,   U uniform(-1, 1) [k, rows, columns], drawn from a seed

Only the seed and the k coefficients c are trained or stored beside A_0; B is made alike.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from vllm_lora_ext.adapters.folder import CONFIG, AdapterFolder
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.readers.base import Reader
from vllm_lora_ext.adapters.readers.names import group, part
from vllm_lora_ext.adapters.readers.peft_config import PeftLora, bad_value, read_peft_config
from vllm_lora_ext.adapters.readers.tuners import check_shape, take_shaped, whole
from vllm_lora_ext.errors import AdapterError

_PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB]\.(weight|seed|coefficients))")
_MARK = re.compile(r".+\.lora_[AB]\.(seed|coefficients)")
_KEYS = ("use_nola", "nola_num_basis")
_CHUNK = 1 << 24  # values of a basis in memory at once
_MAX_DRAWS = 1 << 34  # a minute or two
_SETTINGS = {
    "device": "where the basis was drawn; only cpu (the default) can be drawn again",
    "basis_check": "values of the trainer's basis: {<module>.lora_A: {first_four, last}, ...};"
    " optional, compared with what is drawn here",
}


def detect(folder: AdapterFolder) -> bool:
    named = folder.config.get("use_nola") is True or any(map(_MARK.fullmatch, folder.names))
    return folder.config.get("peft_type") == "LORA" and named


def read(folder: AdapterFolder) -> RoutedAdapter:
    _check_work(folder)
    config, pairs, _ = read_pairs(folder)
    modules = {
        name: RoutedModule(a_RK=a_RK, b_NR=b_NR * config.scale(name))
        for name, (a_RK, b_NR) in pairs.items()
    }
    return RoutedAdapter(modules, system="nola", base_model=config.base_model)


def read_pairs(
    folder: AdapterFolder,
) -> tuple[PeftLora, dict[str, tuple[torch.Tensor, torch.Tensor]], bool]:
    """The config, every layer's A and B without a scale, and whether the basis was checked.

    Raises:
        AdapterError: as for an ordinary LoRA; `setting_mismatch`, this torch draws another basis.
    """
    config = read_peft_config(folder.config, also=_KEYS, accepted=folder.accepted)
    if folder.config.get("use_nola", True) is not True:
        raise bad_value(f"use_nola in {CONFIG}", folder.config["use_nola"], "true")
    count = whole(folder.config, "nola_num_basis")
    if folder.has_setting("device") and folder.setting("device", _SETTINGS["device"]) != "cpu":
        raise AdapterError(
            "unsupported_feature", "NOLA's basis was drawn on a GPU, whose stream differs",
            seen=folder.setting("device", ""), limit="cpu", fix="expand it where it was trained",
        )  # fmt: skip
    checks = _checks(folder)
    pairs = {}
    for name, parts in group(folder.names, _PART).items():
        rank = config.rank(name)
        a_RK = _side(folder, name, parts, "A", (rank, None), count, checks)
        pairs[name] = a_RK, _side(folder, name, parts, "B", (None, rank), count, checks)
    unused = sorted(set(checks) - {f"{name}.lora_{side}" for name in pairs for side in "AB"})
    if unused:
        raise bad_value("basis_check", unused[0], "names of this adapter's matrices")
    return config, pairs, bool(checks)


def _check_work(folder: AdapterFolder) -> None:
    """A server must not stand still while it draws for hours. Raises AdapterError `too_large`."""
    frozen = (name for name in folder.names if name.endswith((".lora_A.weight", ".lora_B.weight")))
    draws = sum(math.prod(folder.shape(name)) for name in frozen)
    draws *= whole(folder.config, "nola_num_basis")
    if draws > _MAX_DRAWS:
        raise AdapterError(
            "too_large", "the random basis is too large to be drawn by a server",
            seen=f"{draws} numbers", limit=_MAX_DRAWS,
            fix="make an ordinary LoRA of it: vllm-lora-ext convert --rank, its own rank or less",
        )  # fmt: skip


def _checks(folder: AdapterFolder) -> Mapping[str, Any]:
    checks: Any = {}
    if folder.has_setting("basis_check"):
        checks = folder.setting("basis_check", _SETTINGS["basis_check"])
    if not isinstance(checks, dict):
        raise bad_value("basis_check", checks, "an object")
    return checks


def _side(
    folder: AdapterFolder, module: str, parts: dict[str, str], side: str,
    shape: tuple[int | None, ...], count: int, checks: Mapping[str, Any],
) -> torch.Tensor:  # fmt: skip
    stem = f"lora_{side}"
    frozen = take_shaped(folder, part(parts, f"{stem}.weight", module), *shape)
    seed_name = part(parts, f"{stem}.seed", module)
    check_shape(seed_name, folder.shape(seed_name), 1)
    seed = int(folder.take_whole(seed_name))
    value_C = take_shaped(folder, part(parts, f"{stem}.coefficients", module), count)
    return frozen + expand(seed, value_C, tuple(frozen.shape), checks.get(f"{module}.{stem}"))


def expand(
    seed: int, value_C: torch.Tensor, shape: tuple[int, ...], check: Mapping[str, Any] | None = None
) -> torch.Tensor:
    """`1/sqrt(k) sum_b value_b U_b` of the given shape, the basis drawn a chunk at a time.

    Chunks keep the stream of one draw: torch's CPU generator fills uniform values in order.

    Raises:
        AdapterError: `setting_mismatch`, the stream is not the one that `check` was taken from.
    """
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape)
    step = max(1, _CHUNK // size)
    total = torch.zeros(size, dtype=torch.float64)
    first: torch.Tensor | None = None
    last = 0.0
    for start in range(0, len(value_C), step):
        part_C = value_C[start : start + step]
        basis = torch.empty(len(part_C) * size).uniform_(-1, 1, generator=generator)
        first, last = basis[:4].clone() if first is None else first, float(basis[-1])
        total += part_C.double() @ basis.view(len(part_C), size).double()
    if check is not None and first is not None:
        wanted = _wanted(check, len(first))
        seen = torch.cat([first, torch.tensor([last])])
        if not torch.allclose(seen, wanted, atol=1e-6):
            raise AdapterError(
                "setting_mismatch", "this torch draws another basis than the trainer's did",
                seen=seen.tolist(), limit=wanted.tolist(),
                fix="expand it on the machine that trained it",
            )  # fmt: skip
    return (total / math.sqrt(len(value_C))).float().view(shape)


def _wanted(check: Any, count: int) -> torch.Tensor:
    """[count + 1] the first values of a basis and its last one."""
    values = [*check.get("first_four", ()), check.get("last")] if isinstance(check, dict) else []
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    if not numbers or len(values) != count + 1:
        raise bad_value("basis_check", check, "{first_four: four numbers, last: a number}")
    return torch.tensor(values)


READER = Reader(
    name="nola",
    title="NOLA",
    url="https://github.com/UCDvision/NOLA",
    files="adapter_config.json (peft_type LORA, use_nola, nola_num_basis), "
    "adapter_model.safetensors with <module>.lora_A.weight, .lora_A.coefficients, .lora_A.seed and "
    "the same of lora_B",
    peft_types=("LORA",),
    detect=detect,
    read=read,
    paper="NOLA: Compressing LoRA using Linear Combination of Random Basis (arXiv 2310.02556)",
    summary="No gate: a LoRA whose A and B are combinations of random matrices, which are drawn "
    "again from a stored seed.",
    formula="y = W x + alpha/r B A x,  A = A_0 + 1/sqrt(k) sum_b c_b U_b,  B alike",
    settings=_SETTINGS,
    traps=(
        "The basis comes from torch's CPU generator: another device, or a version of torch with "
        "another stream, draws another adapter. basis_check tells.",
    ),
)
