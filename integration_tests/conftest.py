from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from integration_tests.engines import close, make_engine

# Which files' tests run in one process, because they share engines; those of a folder share a
# server, and do so too.
_TOGETHER = (
    "authors_numbers bad_adapters_offline conditioned formats labels ladder logits matrix"
    " properties residency rl stock templates",
    "dora rank_attention rewards two_pass verify_cli",
)
_GROUP = {f"test_{name}.py": group for group in _TOGETHER for name in group.split()}
# What takes longest begins first, so that no process waits at the end.
_FIRST = (
    _TOGETHER[0], "one_server", "test_tensor_parallel.py", _TOGETHER[1], "test_smollm2.py",
    "test_trace.py", "test_pooling.py", "test_mixes.py", "test_two_engines.py",
)  # fmt: skip
TWO_PASS = {
    "lora_ext": {"two_pass": True, "rank_attention": {"heads": 4, "head_size": 32}}
}  # fmt: skip


@pytest.fixture(scope="session")
def llama() -> Iterator[Any]:
    """Tiny Llama under vLLM's default compile mode."""
    llm = make_engine("base_llama")
    yield llm
    close(llm)


@pytest.fixture(scope="session")
def llama_eager() -> Iterator[Any]:
    """The same without a compiler, with prompts prefilled in one piece, with two passes and room
    for attention over A x, and open to all folders that settings allow."""
    allowed = {"pickle": "weights_only", "accept_config_keys": ["newest_option"]}
    llm = make_engine(
        "base_llama", enforce_eager=True, max_num_batched_tokens=512, max_loras=6,
        additional_config={"lora_ext": TWO_PASS["lora_ext"] | allowed},
    )  # fmt: skip
    yield llm
    close(llm)


@pytest.fixture(scope="session")
def qwen2() -> Iterator[Any]:
    """Tiny Qwen2: biases on q, k, v; one key/value head; tied output matrix; with two passes and
    room for attention over A x."""
    llm = make_engine("base_qwen2", additional_config=TWO_PASS)
    yield llm
    close(llm)


@pytest.fixture(scope="session")
def llama_mha() -> Iterator[Any]:
    """Tiny Llama with as many key/value heads as heads; prompts may be embeddings."""
    llm = make_engine("base_llama_mha", enable_prompt_embeds=True)
    yield llm
    close(llm)


class ByEngine(LoadScopeScheduling):
    """A file's tests run in one process, and so do a folder's, and files that share engines."""

    def _split_scope(self, nodeid: str) -> str:
        return _scope(nodeid)


def _scope(nodeid: str) -> str:
    folder, _, file = nodeid.partition("::")[0].rpartition("/")
    folder = folder.removeprefix("integration_tests").removeprefix("/")
    return folder or _GROUP.get(file, file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByEngine:
    config.option.loadscopereorder = False  # not by the number of tests
    return ByEngine(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: (*_FIRST, _scope(item.nodeid)).index(_scope(item.nodeid)))
