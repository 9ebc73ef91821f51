"""The site has every page, its links lead somewhere, and its menu names what there is."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "scripts" / "site.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.OUT = tmp_path_factory.mktemp("pages")
    assert module.main() == 0
    return module


def test_the_menu_has_every_page_but_those_of_single_systems(script: ModuleType) -> None:
    pages = {str(place) for place in script.places().values()}
    named = set(_leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert named <= pages
    assert all(page.startswith("systems/") for page in pages - named)


def test_links_lead_to_pages_and_files_of_the_site(script: ModuleType) -> None:
    seen = 0
    for page in script.OUT.rglob("*.md"):
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)\s#]+)", text):
            if not re.match(r"[a-z]+:", target):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
                seen += 1
    assert seen > 200


def _leaves(menu: Any) -> list[str]:
    if isinstance(menu, str):
        return [menu]
    items = menu if isinstance(menu, list) else menu.values()
    return [leaf for item in items for leaf in _leaves(item)]
