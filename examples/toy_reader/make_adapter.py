"""Writes a random ToyMoE adapter, as that system's own training code would save it.

python make_adapter.py FOLDER --layers 3 --hidden 128 --inner 224
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--inner", type=int, default=224)
    parser.add_argument("--experts", type=int, default=5)
    parser.add_argument("--rank", type=int, default=3)
    parser.add_argument("--k", type=int, default=2)
    given = parser.parse_args()
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    tensors = {}
    for layer in range(given.layers):
        stem = f"model.layers.{layer}.mlp.up_proj.toy"
        tensors[f"{stem}.router.weight"] = random(given.experts, given.hidden)
        for e in range(given.experts):
            tensors[f"{stem}.down.{e}.weight"] = random(given.rank, given.hidden)
            tensors[f"{stem}.up.{e}.weight"] = random(given.inner, given.rank)
    given.folder.mkdir(parents=True)
    config = {"peft_type": "TOY_MOE", "rank": given.rank, "scale": 1.5}
    (given.folder / "adapter_config.json").write_text(json.dumps(config))
    (given.folder / "routing.json").write_text(json.dumps({"k": given.k}))
    save_file(tensors, given.folder / "adapter_model.safetensors")


if __name__ == "__main__":
    main()
