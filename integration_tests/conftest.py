from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import pytest

from integration_tests.engines import close, make_engine

_COMPILED = {"llama", "llama_mha"}
_ENGINES = _COMPILED | {"llama_eager", "qwen2"}

TWO_PASS = {"lora_ext": {"two_pass": True}}


@pytest.fixture(scope="session")
def llama() -> Iterator[Any]:
    """Tiny Llama under vLLM's default compile mode."""
    llm = make_engine("base_llama")
    yield llm
    close(llm)


@pytest.fixture(scope="session")
def llama_eager() -> Iterator[Any]:
    """The same without a compiler, with prompts prefilled in one piece, with two passes, and open
    to all folders that settings allow."""
    allowed = {"pickle": "weights_only", "accept_config_keys": ["newest_option"]}
    llm = make_engine(
        "base_llama", enforce_eager=True, max_num_batched_tokens=512, max_loras=6,
        additional_config={"lora_ext": TWO_PASS["lora_ext"] | allowed},
    )  # fmt: skip
    yield llm
    close(llm)


@pytest.fixture(scope="session")
def qwen2() -> Iterator[Any]:
    """Tiny Qwen2: biases on q, k, v; one key/value head; tied output matrix; with two passes."""
    llm = make_engine("base_qwen2", additional_config=TWO_PASS)
    yield llm
    close(llm)


@pytest.fixture(scope="session")
def llama_mha() -> Iterator[Any]:
    """Tiny Llama with as many key/value heads as heads; prompts may be embeddings."""
    llm = make_engine("base_llama_mha", enable_prompt_embeds=True)
    yield llm
    close(llm)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # xdist reads the marks in its own
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Generator[None, Any, Any]:
    """A file's tests run in one process, and so do all files whose engines are compiled: a start
    less for each engine. Those that share only cheap ones make the second process's first."""
    shared: dict[str, set[str]] = {}
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        shared.setdefault(item.path.name, set()).update(_ENGINES.intersection(fixtures))
    for item in items:
        used = shared[item.path.name]
        group = "compiled" if used & _COMPILED else "eager" if used else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))
    return (yield)
