"""What vLLM made of its options, asked of a running engine."""

from __future__ import annotations

from typing import Any


def of_worker(worker: Any) -> dict[str, str]:
    """Runs in a worker: the graph mode and the attention backend that were resolved there."""
    config = worker.vllm_config.compilation_config
    layers = config.static_forward_context.values()
    backends = {x.get_attn_backend().get_name() for x in layers if hasattr(x, "get_attn_backend")}
    return {
        "graph_mode": getattr(config.cudagraph_mode, "name", "NONE"),
        "attention_backend": ", ".join(sorted(backends)),
        "model_runner": "v2"
        if ".gpu.model_runner" in type(worker.model_runner).__module__
        else "v1",
    }


def of_engine(llm: Any) -> dict[str, str]:
    """The first worker's; needs VLLM_ALLOW_INSECURE_SERIALIZATION=1 where it is another process."""
    found: dict[str, str] = llm.collective_rpc(of_worker)[0]
    return found
