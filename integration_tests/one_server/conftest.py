"""The one server, for all files of this folder: it ends with the last of their tests."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from integration_tests.one_server.asking import LOADING, MOE, PLAIN, TOKEN
from integration_tests.server import Server, base_with_tokenizer, command, free_port, serving
from vllm_lora_ext.adapters.readers.native import write_native
from vllm_lora_ext.adapters.registry import load_adapter

# The route that calls the workers directly: a test takes an adapter away as an eviction would.
CALLING = {"VLLM_SERVER_DEV_MODE": "1"}


@dataclasses.dataclass(frozen=True)
class Places:
    base: Path
    adapters: Path
    outside: Path
    token: Path


@pytest.fixture(scope="package")
def places(tmp_path_factory) -> Places:
    """A base with a tokenizer; a folder that adapters may be read from, and one that not."""
    root = tmp_path_factory.mktemp("server")
    adapters, outside = root / "adapters", root / "outside"
    shutil.copytree(PLAIN.folder, adapters / "plain")
    shutil.copytree(MOE.folder, adapters / "loramoe")
    write_native(load_adapter(MOE.folder), adapters / "native")
    shutil.copytree(PLAIN.folder, outside / "plain")
    (root / "token").write_text(f"{TOKEN}\n")
    return Places(base_with_tokenizer(root / "base_llama"), adapters, outside, root / "token")


@pytest.fixture(scope="package")
def server(places) -> Iterator[Server]:
    settings = {
        "adapter_roots": [str(places.adapters)], "max_router_rows": 8,
        "admin_token_file": str(places.token),
    }  # fmt: skip
    argv = command(
        places.base, free_port(), settings,
        "--enable-scale-out",  # the route that takes tokens and gives some
        "--lora-modules", f"plain={places.adapters}/plain", f"loramoe={places.adapters}/loramoe",
    )  # fmt: skip
    with serving(argv, places.base.parent / "server.log", **LOADING, **CALLING) as running:
        yield running


@pytest.fixture(scope="package")
def client(server) -> Iterator[OpenAI]:
    with OpenAI(
        base_url=f"{server.url}/v1", api_key="none", timeout=60, max_retries=0,
        http_client=httpx.Client(trust_env=False),
    ) as openai:  # fmt: skip
        yield openai
