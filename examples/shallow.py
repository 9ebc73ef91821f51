"""A second base model for the demo: SmolLM2-135M-Instruct without its least needed layers.

Offline there is one chat model only, so `trans_lora.py` moves its adapter to a relative of it. A
layer that hardly turns its input is hardly missed (ShortGPT's block influence, 1 - cosine of what
goes in and what comes out, over a few ordinary sentences). What is left is not healed by any
training: it is a weaker model, with fewer layers, to which adapters of the whole model do not fit.

    python examples/shallow.py               # 30 layers to 24; prints the folder
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from base_model import FOLDER, cache_dir, ensure_base
from safetensors.torch import load_file, save_file
from smollm import load

REMOVED = 6
SENTENCES = (
    "The mitochondrion is the part of the cell that turns food into energy.",
    "In 1969 two people walked on the Moon while a third stayed in orbit around it.",
    "To make bread, mix flour, water, salt and yeast, let the dough rise, and bake it.",
    "def add(a, b):\n    return a + b\n",
    "She opened the letter, read it twice, and put it back without saying a word.",
    "Rivers carry sand and mud to the sea, where they settle and slowly become rock.",
)


@torch.inference_mode()
def influence(model, rows: list[list[int]]) -> list[float]:
    """How much each layer turns the hidden state, averaged over the rows of token ids."""
    sums = [0.0] * model.config.num_hidden_layers
    for row in rows:
        states = model(torch.tensor([row]), output_hidden_states=True).hidden_states
        for i in range(len(sums)):
            same_1L = F.cosine_similarity(states[i].float(), states[i + 1].float(), dim=-1)
            sums[i] += 1 - same_1L.mean().item()
    return [total / len(rows) for total in sums]


def least_needed(influences: list[float], count: int) -> list[int]:
    """The layers of least influence; never the first or the last."""
    inner = range(1, len(influences) - 1)
    if not 0 <= count <= len(inner):
        raise ValueError(f"{count} layers to remove; allowed: 0 to {len(inner)}")
    return sorted(sorted(inner, key=lambda i: influences[i])[:count])


def remove_layers(model, removed: list[int]) -> None:
    """Takes the layers out of the model and its config, which remembers them."""
    kept = [i for i in range(model.config.num_hidden_layers) if i not in set(removed)]
    layers = [model.model.layers[i] for i in kept]
    for place, layer in enumerate(layers):
        layer.self_attn.layer_idx = place  # its row of the KV cache
    model.model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in kept]
    model.config.removed_layers = list(removed)


@torch.inference_mode()
def perplexity(model, rows: list[list[int]]) -> float:
    losses = [model(ids, labels=ids).loss * (ids.shape[1] - 1) for ids in map(_one, rows)]
    return torch.exp(torch.stack(losses).sum() / sum(len(row) - 1 for row in rows)).item()


def _one(row: list[int]) -> torch.Tensor:
    return torch.tensor([row])


def ensure_shallow(count: int = REMOVED) -> Path:
    """The shallow model's folder in the cache, made first if it is not there."""
    folder = cache_dir() / f"{FOLDER}-without-{count}"
    if (folder / "config.json").is_file():
        return folder
    model, tokenizer = load()
    rows = [tokenizer(text)["input_ids"] for text in SENTENCES]
    before = perplexity(model, rows)
    remove_layers(model, least_needed(influence(model, rows), count))
    model.config.perplexity_before_after = [round(before, 1), round(perplexity(model, rows), 1)]
    building = Path(tempfile.mkdtemp(prefix=".shallow-", dir=ensure_base().parent))
    try:
        model.save_pretrained(building)
        tokenizer.save_pretrained(building)
        building.chmod(0o755)
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def renumber(adapter: Path, removed: list[int], out: Path) -> Path:
    """A LoRA of the whole model for the shallow one: what is left of it, at its new places."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = {}
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        layer = int(re.search(r"\.layers\.(\d+)\.", name)[1])
        if layer not in removed:
            tensors[name.replace(f".layers.{layer}.", f".layers.{place(layer, removed)}.")] = tensor
    layers = config["layers_to_transform"]
    if layers is not None:
        layers = [layers] if isinstance(layers, int) else layers
        config["layers_to_transform"] = [place(i, removed) for i in layers if i not in removed]
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    (out / "adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return out


def place(layer: int, removed: list[int]) -> int:
    """Where a layer that stays stands in the shallow model."""
    return layer - sum(i < layer for i in removed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--remove", type=int, default=REMOVED, metavar="N", help="layers to remove")
    folder = ensure_shallow(parser.parse_args().remove)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    print(f"{folder}\nwithout layers {config['removed_layers']};", end=" ")
    print("perplexity {} to {}".format(*config["perplexity_before_after"]))


if __name__ == "__main__":
    main()
