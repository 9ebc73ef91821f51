"""The settings and what they ask of the engine are checked when its configuration is made.

Target: `EngineArgs.create_engine_config`, the way in of servers and of offline engines, so that a
typo or two options that exclude each other end the start with one error before a weight is read.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.engine.arg_utils import EngineArgs

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.backend import asks_for_triton, check_graphs
from vllm_lora_ext.model_patches.rows import unknown_rows
from vllm_lora_ext.settings import LoraExtSettings

_BY_TOKENS = "ExampleConnector"


def check_config(vllm_config: Any, lora_config: Any) -> LoraExtSettings:
    """The settings of an engine with LoRA.

    Raises:
        AdapterError: `bad_settings`, a setting is wrong, or does not go with the engine's options.
    """
    settings = LoraExtSettings.from_additional_config(vllm_config.additional_config)
    # Whether the kernels pass their check here is found out where they run; if not, it says so.
    device_type = vllm_config.device_config.device_type
    triton = asks_for_triton(settings.triton, device_type)
    mode = vllm_config.compilation_config.cudagraph_mode
    graphs = check_graphs(mode and mode.name, device_type, triton)
    if settings.trace:
        check_trace(vllm_config, graphs)
    _check_connector(vllm_config.kv_transfer_config)
    return settings


def _check_connector(transfer: Any) -> None:
    """KV of other weights must not be taken for a request's own: most connectors know it by vLLM's
    block hashes, where an adapter's digest is."""
    if transfer is not None and transfer.has_connector(_BY_TOKENS):
        raise AdapterError(
            "bad_settings", "this KV connector names what it keeps by the tokens alone, so that one"
            " adapter's requests would get another's", seen=_BY_TOKENS,
            limit="connectors that use vLLM's block hashes, as OffloadingConnector does",
            fix="choose another connector, or start without LoRA",
        )  # fmt: skip


def check_trace(vllm_config: Any, graphs: bool) -> None:
    """Raises AdapterError `bad_settings` where an engine cannot keep traces."""
    for seen, limit, fix in (
        (graphs, "an engine without CUDA graphs, which do not run the recorder",
         "start with --enforce-eager"),
        (vllm_config.speculative_config is not None, "an engine without speculative decoding",
         "start without it"),
        (getattr(vllm_config.lora_config, "enable_tower_connector_lora", False),
         "an engine whose LoRA is on the language model only",
         "start without --enable-tower-connector-lora"),
        (getattr(vllm_config.lora_config, "fully_sharded_loras", False),
         "an engine whose ranks have whole routers", "start without --fully-sharded-loras"),
        (unknown_rows(vllm_config), "an engine that knows on the host which rows are whose",
         "start without it"),
    ):  # fmt: skip
        if seen:
            raise AdapterError(
                "bad_settings", "the setting trace is true, and this engine cannot keep traces",
                limit=limit, fix=f"{fix}, or leave the setting trace out",
            )  # fmt: skip


def apply() -> None:
    """Wraps the making of the configuration, which happens in the front end only."""
    create = EngineArgs.create_engine_config

    @functools.wraps(create)
    def create_engine_config(
        self: EngineArgs, usage_context: Any = None, headless: bool = False
    ) -> Any:
        settings = LoraExtSettings.from_additional_config(self.additional_config)
        if not headless:  # else this machine has workers only
            settings.check_front_end()
        config = create(self, usage_context, headless)
        if config.lora_config is not None:
            check_config(config, config.lora_config)
        return config

    EngineArgs.create_engine_config = create_engine_config
