"""Fixtures of requests that say something about their adapters, and the examples of the docs."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from integration_tests.engines import FIXTURES

DOCS = Path(__file__).parent.parent / "docs"


@dataclass(frozen=True)
class Conditioned:
    """A fixture: folders of adapters, requests, and what each is to be answered."""

    name: str
    folder: Path

    @cached_property
    def requests(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads((self.folder / "meta.json").read_text())[
            "requests"
        ]
        return found

    @property
    def adapters(self) -> list[Path]:
        return sorted((self.folder / "adapters").iterdir())

    def prompt(self, request: dict[str, Any]) -> list[int]:
        return self._expected[f"prompt_{request['prompt']}"].tolist()

    def logits(self, request: dict[str, Any]) -> torch.Tensor:
        """[T, V]: after every position of the prompt."""
        return self._expected[f"logits_r{request['request']}"]

    def greedy(self, request: dict[str, Any]) -> list[int]:
        return self._expected[f"greedy_r{request['request']}"].tolist()

    @cached_property
    def _expected(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "expected.safetensors")


def conditioned(name: str) -> Conditioned:
    return Conditioned(name, FIXTURES / "conditioned" / name)


def examples(page: str, tag: str) -> list[str]:
    """Python examples of a page of the docs that stand in a fence "python TAG"."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.findall(rf"^```python {tag}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found, f"{page} has no example of {tag}"
    return found
