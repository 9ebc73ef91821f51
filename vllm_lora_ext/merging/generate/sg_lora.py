"""SG-LoRA: an adapter for a task that is only described, from a library of experts.

The description is embedded; the K experts with the most similar embeddings (cosine) are mixed with
softmax(similarity / temperature). Mixed without a generator: the weighted sum of their deltas, by
concatenation, exact.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from vllm_lora_ext.adapters.paths import resolve_inside
from vllm_lora_ext.adapters.strict_json import parse_object
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.factors import Factors, Pair, load_factors
from vllm_lora_ext.merging.generate.embed import Embedder
from vllm_lora_ext.merging.ops.concat import concat
from vllm_lora_ext.merging.variants.files import Checkpoint

LIBRARY, EMBEDDINGS = "library.json", "embeddings.safetensors"


@dataclass(frozen=True)
class LibraryEntry:
    """One adapter of a library.

    Args:
        name: unique in the library.
        folder: its PEFT folder; in a saved library, below the library's own folder.
        text: the description that was embedded.
        embedding_H: [H] fp32, of length 1.
    """

    name: str
    folder: str
    text: str
    embedding_H: torch.Tensor


class ExpertLibrary:
    """Adapters with the embeddings of their descriptions.

    Args:
        experts: with unique names and embeddings of one length.
        root: what relative folders start at.
    Raises:
        AdapterError: `bad_value`.
    """

    def __init__(self, experts: Sequence[LibraryEntry], root: str | os.PathLike[str] = ".") -> None:
        names = [expert.name for expert in experts]
        lengths = {tuple(expert.embedding_H.shape) for expert in experts}
        if not experts or len(set(names)) < len(names) or len(lengths) > 1:
            raise AdapterError(
                "bad_value", "a library needs experts with names of their own and embeddings of one"
                " length", seen=f"{names[:4]}, lengths {sorted(lengths)}", limit="one or more",
            )  # fmt: skip
        self.experts, self.root = tuple(experts), Path(root)

    @classmethod
    def build(
        cls, described: Mapping[str, tuple[str, str]], embed: Embedder,
        root: str | os.PathLike[str] = ".",
    ) -> ExpertLibrary:  # fmt: skip
        """A library from name → (folder, description).

        Raises:
            AdapterError: `bad_value`.
        """
        experts = [
            LibraryEntry(name, folder, text, _unit(embed(text)))
            for name, (folder, text) in described.items()
        ]
        return cls(experts, root)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `library.json` and `embeddings.safetensors`; the adapters stay where they are."""
        where = Path(folder)
        where.mkdir(parents=True, exist_ok=True)
        table = {e.name: {"folder": e.folder, "text": e.text} for e in self.experts}
        (where / LIBRARY).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        save_file({e.name: e.embedding_H for e in self.experts}, where / EMBEDDINGS)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> ExpertLibrary:
        """A saved library. Raises AdapterError `missing_file`, `bad_json`, `bad_value`, ..."""
        where = Path(folder)
        if not (where / LIBRARY).is_file():
            raise AdapterError("missing_file", f"'{LIBRARY}' is missing", seen=str(where))
        table = parse_object((where / LIBRARY).read_bytes(), LIBRARY)
        vectors = Checkpoint(where / EMBEDDINGS)
        experts = []
        for name, entry in table.items():
            texts = isinstance(entry, dict) and [entry.get("folder"), entry.get("text")]
            if not texts or not all(isinstance(text, str) for text in texts):
                raise AdapterError(
                    "bad_value", f"{LIBRARY}: '{name}' is broken", limit="folder and text"
                )
            vector_H = _unit(vectors.take(name))
            experts.append(LibraryEntry(name, entry["folder"], entry["text"], vector_H))
        return cls(experts, where)

    def select(
        self, query_H: torch.Tensor, k: int = 4, temperature: float = 0.1
    ) -> dict[str, float]:
        """The k nearest experts and their weights, which sum to 1; the nearest first.

        Args:
            query_H: [H], embedding of the description.
            k: capped by the library's size.
            temperature: of the softmax over the cosines.
        Raises:
            AdapterError: `bad_value`, `bad_shape`.
        """
        if k < 1 or not (temperature > 0 and math.isfinite(temperature)):
            raise AdapterError(
                "bad_value", "k or temperature is out of range", seen=[k, temperature],
                limit="k from 1, temperature above 0",
            )  # fmt: skip
        table_EH = torch.stack([expert.embedding_H for expert in self.experts])
        if query_H.shape != table_EH.shape[1:]:
            raise AdapterError(
                "bad_shape", "the description's embedding is not of the library's kind",
                seen=list(query_H.shape), limit=list(table_EH.shape[1:]),
                fix="embed it with the model that the library was built with",
            )  # fmt: skip
        cosine_E = table_EH @ _unit(query_H)
        # Ties go to the expert that stands first, on every machine.
        order = sorted(range(len(self.experts)), key=lambda e: (-float(cosine_E[e]), e))[:k]
        weight_K = (cosine_E[order].double() / temperature).softmax(0)
        return {self.experts[e].name: float(w) for e, w in zip(order, weight_K, strict=True)}

    def generate(self, text: str, embed: Embedder, k: int = 4, temperature: float = 0.1) -> Factors:
        """The adapter for a described task: sum of the selected experts' deltas, weighted.

        Returns:
            fp32 factors; the rank of a layer is the sum of its experts' ranks.
        Raises:
            AdapterError: those of `select` and of loading; `shape_mismatch`; `path_not_allowed`.
        """
        weights = self.select(embed(text), k, temperature)
        by_name = {expert.name: expert for expert in self.experts}
        chosen = [
            (load_factors(resolve_inside(by_name[name].folder, [self.root])), weight)
            for name, weight in weights.items()
        ]
        return weighted_sum(chosen)


def weighted_sum(terms: Sequence[tuple[Factors, float]]) -> Factors:
    """sum_i w_i B_i A_i by concatenation; a layer that an adapter lacks counts as zero there."""
    modules: dict[str, list[Pair]] = {}
    for factors, weight in terms:
        for name, pair in factors.modules.items():
            here = modules.setdefault(name, [])
            scaled = Pair(pair.a_RK, pair.b_NR * weight)
            if here and _sizes(here[0]) != _sizes(scaled):
                raise AdapterError(
                    "shape_mismatch", f"the experts' {name} have other sizes",
                    seen=_sizes(scaled), limit=_sizes(here[0]),
                    fix="put experts of one base model into a library",
                )  # fmt: skip
            here.append(scaled)
    joined = {name: concat(pairs) for name, pairs in sorted(modules.items())}
    return Factors(joined, terms[0][0].base_model, "sg_lora")


def _sizes(pair: Pair) -> list[int]:
    return [pair.a_RK.shape[1], pair.b_NR.shape[0]]


def _unit(vector_H: torch.Tensor) -> torch.Tensor:
    vector_H = vector_H.detach().float().flatten()
    norm = vector_H.norm()
    if not bool(norm.isfinite()) or not float(norm):
        raise AdapterError("bad_value", "an embedding is zero or not finite", limit="a direction")
    return vector_H / norm
