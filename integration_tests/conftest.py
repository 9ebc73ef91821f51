from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from integration_tests.engines import close, make_engine


@pytest.fixture(scope="session")
def llama() -> Iterator[Any]:
    """Tiny Llama under vLLM's default compile mode, open to the folders that settings allow."""
    allowed = {"pickle": "weights_only", "accept_config_keys": ["newest_option"]}
    llm = make_engine("base_llama", additional_config={"lora_ext": allowed})
    yield llm
    close(llm)


@pytest.fixture(scope="session")
def llama_eager() -> Iterator[Any]:
    """The same without a compiler, and with prompts prefilled in one piece."""
    llm = make_engine("base_llama", enforce_eager=True, max_num_batched_tokens=512, max_loras=6)
    yield llm
    close(llm)


@pytest.fixture(scope="session")
def qwen2() -> Iterator[Any]:
    """Tiny Qwen2: biases on q, k, v; one key/value head; tied output matrix."""
    llm = make_engine("base_qwen2")
    yield llm
    close(llm)


@pytest.fixture(scope="session")
def llama_mha() -> Iterator[Any]:
    """Tiny Llama with as many key/value heads as heads; prompts may be embeddings."""
    llm = make_engine("base_llama_mha", enable_prompt_embeds=True)
    yield llm
    close(llm)
