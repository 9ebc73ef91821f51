"""ICM-LoRA (arXiv 2501.17635): a whole adapter decoded by a conditional VAE.

    z ~ N(0, I) → Linear(z, condition) → transposed convolutions → one flat vector
    → cut by a reference layout → x · std + mean per tensor → A and B

The layout comes from a trained adapter of the same task: its key order, shapes, mean and std.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional

from vllm_lora_ext.adapters.folder import CONFIG, WEIGHTS
from vllm_lora_ext.adapters.strict_json import parse_object
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.factors import Factors, load_factors
from vllm_lora_ext.merging.variants.files import Checkpoint, load_reference

_EPSILON = 1e-5  # of torch's batch norm
_LAYER = re.compile(r"decoder\.(\d+)\.0\.weight")


@dataclass(frozen=True)
class TensorLayout:
    """Where one tensor stands in the flat vector, and how it was normalised."""

    name: str
    shape: tuple[int, ...]
    mean: float
    std: float

    @property
    def length(self) -> int:
        return torch.Size(self.shape).numel()


class Decoder:
    """The decoding half of ICM-LoRA's CVAE, built from its tensor names alone.

    Args:
        path: safetensors file with `to_decode`, `decoder.<i>` and `final_layer`.
        condition_dim: length of the condition; the rest of the input is the latent.
    Attributes:
        latent_dim: length of z.
    Raises:
        AdapterError: those of `Checkpoint`; `missing_tensor`, `bad_shape`.
    """

    def __init__(self, path: str | os.PathLike[str], condition_dim: int) -> None:
        self._file = Checkpoint(path)
        steps = [int(m[1]) for name in self._file.names if (m := _LAYER.fullmatch(name))]
        self._steps = len(steps)
        if sorted(steps) != list(range(self._steps)):
            raise AdapterError(
                "missing_tensor", "the decoder's layers are not numbered through",
                seen=sorted(steps), fix="save the generator again",
            )  # fmt: skip
        self.input_dim = self._file.shape("to_decode.weight")[1]
        self.latent_dim = self.input_dim - condition_dim
        if self.latent_dim < 1:
            raise AdapterError(
                "bad_shape", "the condition is longer than the decoder's input",
                seen=condition_dim, limit=f"below {self.input_dim}", fix="give its condition",
            )  # fmt: skip

    def __call__(self, z_L: torch.Tensor, condition_C: torch.Tensor) -> torch.Tensor:
        """The flat vector, its padding included, fp32.

        Args:
            z_L: [latent_dim]; condition_C: [condition_dim].
        """
        x = torch.cat([z_L.flatten(), condition_C.flatten()]).float()
        if len(x) != self.input_dim:
            raise AdapterError(
                "bad_shape", "latent and condition do not fit the generator", seen=len(x),
                limit=self.input_dim, fix="give the latent and condition it was trained with",
            )  # fmt: skip
        channels = self._take("decoder.0.0.weight").shape[0]
        x = self._take("to_decode.weight") @ x + self._take("to_decode.bias")
        x = x.view(1, channels, -1)
        for step in range(self._steps):
            x = self._grow(x, f"decoder.{step}.0", f"decoder.{step}.1")
        x = self._grow(x, "final_layer.0", "final_layer.1")
        weight = self._take("final_layer.3.weight")
        bias = self._take("final_layer.3.bias")
        return functional.conv1d(x, weight, bias, padding=weight.shape[-1] // 2)[0, 0]

    def _grow(self, x: torch.Tensor, convolution: str, norm: str) -> torch.Tensor:
        """Twice the length: transposed convolution, batch norm in evaluation, ELU."""
        weight, bias = self._take(f"{convolution}.weight"), self._take(f"{convolution}.bias")
        x = functional.conv_transpose1d(
            x, weight, bias, stride=2, padding=weight.shape[-1] // 2, output_padding=1
        )
        mean, variance = self._take(f"{norm}.running_mean"), self._take(f"{norm}.running_var")
        scale, shift = self._take(f"{norm}.weight"), self._take(f"{norm}.bias")
        x = functional.batch_norm(x, mean, variance, scale, shift, eps=_EPSILON)
        return functional.elu(x)

    def _take(self, name: str) -> torch.Tensor:
        return self._file.take(name).float()


def read_layout(path: str | os.PathLike[str], allow_pickle: bool = False) -> list[TensorLayout]:
    """The reference layout, in the order of its keys.

    Args:
        path: JSON, key → {mean, std, length, shape}; or the authors' torch file of the same.
    Raises:
        AdapterError: `missing_file`, `bad_json`, `pickle_refused`, `bad_value`.
    """
    path = Path(path)
    if path.suffix == ".json":
        if not path.is_file():
            raise AdapterError("missing_file", "there is no layout", seen=str(path))
        table: Mapping[str, Any] = parse_object(path.read_bytes(), path.name)
    else:
        table = load_reference(path, allow_pickle)
    layout = []
    for name, entry in table.items():
        if name == "data" and not isinstance(entry, dict):
            continue
        try:
            one = TensorLayout(
                name, tuple(int(n) for n in entry["shape"]), float(entry["mean"]),
                float(entry["std"]),
            )  # fmt: skip
            fits = one.length == int(entry["length"])
        except (KeyError, TypeError, ValueError, OverflowError):
            fits = False
        if not fits:
            raise AdapterError(
                "bad_value", f"the layout's entry '{name}' is broken", seen=repr(entry)[:80],
                limit="mean, std, shape, and length = the product of shape",
            )  # fmt: skip
        layout.append(one)
    return layout


def decode_adapter(
    generator: str | os.PathLike[str],
    layout: str | os.PathLike[str],
    config: Mapping[str, Any],
    condition_C: torch.Tensor,
    *,
    z_L: torch.Tensor | None = None,
    seed: int | None = None,
    allow_pickle: bool = False,
) -> Factors:
    """Generate one adapter.

    Args:
        generator: the CVAE as safetensors; its encoder may be missing.
        layout: see `read_layout`.
        config: PEFT's `adapter_config.json` of the reference adapter: rank and scale are there.
        condition_C: [condition_dim], the task vector.
        z_L: [latent_dim]; without it z is drawn from `seed`, which then is part of the recipe.
    Returns:
        fp32 factors, scale folded into B.
    Raises:
        AdapterError: those of `Decoder`, `read_layout`, `load_factors`; `missing_setting`, neither
            z nor seed; `bad_shape`, the layout is longer than the vector.
    """
    decoder = Decoder(generator, condition_C.numel())
    if z_L is None:
        if seed is None:
            raise AdapterError(
                "missing_setting", "a generated adapter needs its latent or a seed",
                fix="give z or seed",
            )  # fmt: skip
        z_L = torch.randn(decoder.latent_dim, generator=torch.Generator().manual_seed(seed))
    entries = read_layout(layout, allow_pickle)
    tensors = unflatten(decoder(z_L, condition_C), entries)
    return from_tensors(tensors, config)


def unflatten(flat_V: torch.Tensor, layout: list[TensorLayout]) -> dict[str, torch.Tensor]:
    """Cut a flat vector and undo the normalisation. What is left over is padding."""
    wanted = sum(entry.length for entry in layout)
    if wanted > len(flat_V):
        raise AdapterError(
            "bad_shape", "the layout is longer than the generated vector", seen=wanted,
            limit=len(flat_V), fix="give the layout that this generator was trained with",
        )  # fmt: skip
    pieces = flat_V[:wanted].split([entry.length for entry in layout])
    return {
        entry.name: (piece * entry.std + entry.mean).view(entry.shape)
        for entry, piece in zip(layout, pieces, strict=True)
    }


def from_tensors(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Factors:
    """Factors of generated PEFT tensors, through the same checks as a folder from outside."""
    with tempfile.TemporaryDirectory(prefix="lora_ext_") as made:
        folder = Path(made)
        (folder / CONFIG).write_text(json.dumps(dict(config)), encoding="utf-8")
        save_file({name: t.contiguous() for name, t in tensors.items()}, folder / WEIGHTS[0])
        factors = load_factors(folder)
    return dataclasses.replace(factors, source="generated")
