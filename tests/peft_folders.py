"""Folders that PEFT itself trained and saved, and whether they are read with PEFT's numbers."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from vllm_lora_ext.adapters import check_fits, load_adapter
from vllm_lora_ext.adapters.hf import apply_adapter, model_shapes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
IDS = torch.randint(4, 500, (1, 24), generator=torch.Generator().manual_seed(0))
STRENGTH, CLOSE = 0.05, 1e-5


_made: dict[int, tuple[tempfile.TemporaryDirectory[str], torch.Tensor]] = {}


def make(folder: Path, base: torch.nn.Module, **lora: Any) -> torch.Tensor:
    """Saves a LoRA with random weights as PEFT saves it; PEFT's logits for `IDS`."""
    if lora:
        return _make(folder, base, lora)
    if id(base) not in _made:  # the same adapter for all tests that change its files
        place = tempfile.TemporaryDirectory()
        _made[id(base)] = place, _make(Path(place.name), base, {})
    place, want = _made[id(base)]
    shutil.copytree(place.name, folder, dirs_exist_ok=True)
    return want


def _make(folder: Path, base: torch.nn.Module, lora: dict[str, Any]) -> torch.Tensor:
    options = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj", "down_proj"]}
    config = LoraConfig(task_type="CAUSAL_LM", **options | lora)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            # In place: tied matrices stay tied.
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * STRENGTH)
    want = model(IDS).logits
    model.save_pretrained(folder)
    return want


def of_peft(folder: Path, base: torch.nn.Module) -> torch.Tensor:
    """The logits of a folder that PEFT reads."""
    return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()(IDS).logits


def assert_serves(
    folder: Path, base: torch.nn.Module, want: torch.Tensor, close: float = CLOSE, **options: Any
) -> None:
    """What `load_adapter` makes of the folder gives `want`, and moves the base model."""
    adapter = load_adapter(folder, **options)
    check_fits(adapter, model_shapes(base), torch.float32)
    plain = base(IDS).logits
    with apply_adapter(base, adapter):
        got = base(IDS).logits
    moved, error = (want - plain).abs().mean().item(), (got - want).abs().max().item()
    print(f"mean |dlogit| {moved:.3f}, largest difference from PEFT {error:.1e}")
    assert moved > 0.005
    assert error <= close


def set_config(folder: Path, drop: tuple[str, ...] = (), **values: Any) -> Path:
    """Changes keys of the folder's config."""
    file = folder / CONFIG
    config = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: v for key, v in config.items() if key not in drop}))
    return folder


def cast(folder: Path, dtype: torch.dtype) -> Path:
    tensors = load_file(folder / WEIGHTS)
    save_file({name: t.to(dtype) for name, t in tensors.items()}, folder / WEIGHTS)
    return folder


def shard(folder: Path, parts: int = 2, stem: str = "adapter_model") -> dict[str, str]:
    """Replaces the weights by shards and an index; the index's table."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    table = {}
    for part in range(parts):
        file = f"{stem}-{part + 1:05}-of-{parts:05}.safetensors"
        names = sorted(tensors)[part::parts]
        save_file({name: tensors[name] for name in names}, folder / file)
        table |= dict.fromkeys(names, file)
    write_index(folder, table, stem)
    return table


def write_index(folder: Path, table: Any, stem: str = "adapter_model") -> None:
    content = {"metadata": {"total_size": 1}, "weight_map": table}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(content))


def as_hub_cache(folder: Path, cache: Path) -> Path:
    """The folder as the Hugging Face cache keeps it: links into `blobs`. The snapshot's path."""
    repo = cache / "models--someone--adapter"
    snapshot, blobs = repo / "snapshots" / "0123abc", repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        if file.is_file():
            shutil.copyfile(file, blobs / f"blob{i}")
            (snapshot / file.name).symlink_to(f"../../blobs/blob{i}")
    return snapshot


def as_pickle(folder: Path, name: str = "adapter_model.bin") -> Path:
    torch.save(load_file(folder / WEIGHTS), folder / name)
    (folder / WEIGHTS).unlink()
    return folder
