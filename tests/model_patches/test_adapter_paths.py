"""Where an adapter's path leads, and what is said of one that leads nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.adapter_paths import find_folder


@pytest.fixture
def roots(tmp_path: Path) -> list[Path]:
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    return [tmp_path / "data"]


@pytest.mark.parametrize(
    ("sent", "code"),
    [("../outside", "path_not_allowed"), ("..", "path_not_allowed"), ("~", "path_not_allowed"),
     ("~/x", "path_not_allowed"), ("/", "path_not_allowed"), ("none", "not_found"),
     ("a/none", "not_found"), ("a\0", "path_not_allowed")],
)  # fmt: skip
def test_an_error_says_the_path_that_was_sent(roots: list[Path], sent: str, code: str) -> None:
    """And not where the roots or somebody's home lie: what clients read is made of it."""
    with pytest.raises(AdapterError) as refused:
        find_folder(sent, roots)
    said = str(refused.value)
    assert refused.value.code == code and f"seen: {sent}".replace("\0", "\\0") in said
    assert str(roots[0].parent) not in said and str(Path.home()) not in said


def test_a_path_below_a_root_is_found(roots: list[Path]) -> None:
    assert find_folder("a", roots) == find_folder(str(roots[0] / "a"), roots) == str(roots[0] / "a")
