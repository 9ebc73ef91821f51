"""The uniform merge of the three task adapters: what one gets without a router.

Made when the demo runs, because it only repeats the three adapters' weights. PEFT's `cat` is
exact: the merged adapter has their ranks side by side, each times 1/3.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from base_model import cache_dir, ensure_base
from tasks import ADAPTERS, TASKS


def ensure_uniform() -> Path:
    """The merge's folder in the cache, made first if it is not there."""
    digest = hashlib.sha256()
    for task in TASKS:
        digest.update((ADAPTERS / task / "adapter_model.safetensors").read_bytes())
    folder = cache_dir() / f"uniform-{digest.hexdigest()[:12]}"
    if not folder.is_dir():
        building = Path(tempfile.mkdtemp(prefix=".uniform-", dir=ensure_base().parent))
        try:
            _build(building)
            os.rename(building / "uniform", folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return folder


def _build(out: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(ensure_base())
    tasks = list(TASKS)
    merged = PeftModel.from_pretrained(model, ADAPTERS / tasks[0], adapter_name=tasks[0])
    for task in tasks[1:]:
        merged.load_adapter(ADAPTERS / task, adapter_name=task)
    weights = [1 / len(tasks)] * len(tasks)
    merged.add_weighted_adapter(tasks, weights, "uniform", combination_type="cat")
    merged.save_pretrained(out, selected_adapters=["uniform"], save_embedding_layers=False)
