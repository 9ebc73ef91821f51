"""The settings and what they ask of the engine are checked when its configuration is made.

Targets: `EngineArgs.create_engine_config`, the way in of servers and of offline engines, so that a
typo or two options that exclude each other end the start with one error before a weight is read;
and `EngineArgs.from_cli_args`, of servers alone, where the adapters are known.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from vllm import envs
from vllm.config import CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs

from vllm_lora_ext.adapters.registry import formats, needs_two_passes
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.methods import all_methods
from vllm_lora_ext.model_patches.backend import asks_for_triton, check_graphs, check_kernels
from vllm_lora_ext.model_patches.rows import unknown_rows
from vllm_lora_ext.settings import KEY, LoraExtSettings

logger = logging.getLogger("vllm.lora_ext")

_BY_TOKENS = "ExampleConnector"


def check_config(vllm_config: Any, lora_config: Any) -> LoraExtSettings:
    """The settings of an engine with LoRA.

    Raises:
        AdapterError: `bad_settings`, a setting is wrong, or does not go with the engine's options;
            `bad_reader`, `bad_method`, an installed package brings one that cannot be used.
    """
    settings = LoraExtSettings.from_additional_config(vllm_config.additional_config)
    formats()  # what installed packages bring is right, or named before weights are read
    if settings.merge is not None:
        all_methods()
    # Whether the kernels pass their check here is found out where they run; if not, it says so.
    device_type = vllm_config.device_config.device_type
    triton = asks_for_triton(settings.triton, device_type)
    check_kernels(settings.of_kernels, triton, device_type)
    if settings.prefetch_weights:
        check_prefetch()
    mode = vllm_config.compilation_config.cudagraph_mode
    graphs = check_graphs(mode and mode.name, device_type, triton)
    if settings.trace:
        check_trace(vllm_config, graphs)
    if settings.two_pass:
        check_two_pass(vllm_config)
    if settings.rank_attention:
        check_rank_attention(vllm_config, settings, graphs)
    _check_connector(vllm_config.kv_transfer_config)
    return settings


def check_prefetch() -> None:
    """Raises AdapterError `bad_settings` where nothing runs beside a product: weights would be
    fetched by one launch more before they are read."""
    if not envs.VLLM_LORA_ENABLE_DUAL_STREAM:
        raise AdapterError(
            "bad_settings", "the setting prefetch_weights is true, and LoRA has no second stream",
            seen="VLLM_LORA_ENABLE_DUAL_STREAM is off", limit="engines that it is on for, which"
            " vLLM does not allow together with --fully-sharded-loras",
            fix="start with VLLM_LORA_ENABLE_DUAL_STREAM=1, or leave the setting prefetch_weights"
            " out",
        )  # fmt: skip


def check_two_pass(vllm_config: Any) -> None:
    """Raises AdapterError `bad_settings` where an engine cannot run its model twice in a step."""
    mode = vllm_config.compilation_config.cudagraph_mode
    _refuse_first("two_pass", "run its model twice in a step", (
        (mode.name if mode and mode.has_full_cudagraphs() else None,
         "an engine whose CUDA graphs are PIECEWISE: a FULL one holds one pass",
         """start with --compilation-config '{"cudagraph_mode": "PIECEWISE"}'"""),
        (vllm_config.parallel_config.pipeline_parallel_size > 1,
         "one pipeline stage: gates come from the last one",
         "start with --tensor-parallel-size instead"),
        *_second_caches(vllm_config),
    ))  # fmt: skip


def check_rank_attention(vllm_config: Any, settings: LoraExtSettings, graphs: bool) -> None:
    """Raises AdapterError `bad_settings` where an engine cannot keep what adapters attend to."""
    dtype = vllm_config.cache_config.cache_dtype
    _refuse_first("rank_attention", "keep what adapters attend to", (
        (graphs, "an engine without CUDA graphs: none holds it", "start with --enforce-eager"),
        (settings.extend_weights > 0 or settings.fuse_activation,
         "linear layers that add what adapters add by themselves",
         "leave out the settings extend_weights and fuse_activation"),
        (vllm_config.parallel_config.world_size > 1, "one rank, which has A x whole",
         "start one server for each GPU"),
        (dtype if dtype not in ("auto", str(vllm_config.model_config.dtype)[6:]) else None,
         "a KV cache of the model's dtype", "start without --kv-cache-dtype"),
        *_second_caches(vllm_config),
    ))  # fmt: skip


_Checks = tuple[tuple[object, str, str], ...]
"""What is seen, if it is in the way; what is served; what mends it."""


def _second_caches(vllm_config: Any) -> _Checks:
    """What is in the way of more than the model's own keys and values in the KV cache."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    return (
        (parallel.data_parallel_size > 1, "an engine that no other one steps with",
         "start one server for each"),
        (parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
         "an engine whose ranks have all tokens of a request", "start without context parallelism"),
        (getattr(vllm_config.kv_transfer_config, "kv_connector", None),
         "an engine that hands no KV blocks to others, which would take the second cache for the"
         " first", "start without a KV connector"),
        (vllm_config.speculative_config is not None, "an engine without speculative decoding",
         "start without it"),
        (vllm_config.cache_config.kv_sharing_fast_prefill,
         "an engine that computes every token in every layer",
         "start without --kv-sharing-fast-prefill"),
        (model.runner_type != "generate", "an engine that generates", "start without --runner"),
        (model.is_multimodal_model or model.is_encoder_decoder,
         "a decoder of text, whose inputs outlive a pass", "serve another model"),
        (unknown_rows(vllm_config), "an engine that knows on the host which rows are whose",
         "start without it"),
    )  # fmt: skip


def _refuse_first(setting: str, what: str, checks: _Checks) -> None:
    for seen, limit, fix in checks:
        if seen:
            raise AdapterError(
                "bad_settings", f"the setting {setting} is given, and this engine cannot {what}",
                seen=None if seen is True else seen, limit=limit,
                fix=f"{fix}, or leave the setting {setting} out",
            )  # fmt: skip


def _without_full_graphs(vllm_config: Any) -> None:
    """vLLM's default on a GPU captures each decode step whole, beside the pieces."""
    compilation = vllm_config.compilation_config
    if compilation.cudagraph_mode == CUDAGraphMode.FULL_AND_PIECEWISE:
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
        logger.info("vllm-lora-ext: two_pass: cudagraph_mode is PIECEWISE, not FULL_AND_PIECEWISE")


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
            if settings.two_pass:
                _without_full_graphs(config)
            check_config(config, config.lora_config)
        return config

    EngineArgs.create_engine_config = create_engine_config
    EngineArgs.from_cli_args = _finding_two_pass(EngineArgs.from_cli_args)


def _finding_two_pass(stock: Any) -> Any:
    """A server turns the setting on by itself where an adapter that it starts with needs it."""

    @functools.wraps(stock.__func__)
    def from_cli_args(cls: type[EngineArgs], args: Any) -> Any:
        made = stock.__func__(cls, args)
        paths = [module.path for module in getattr(args, "lora_modules", None) or ()]
        settings = LoraExtSettings.from_additional_config(made.additional_config)
        needing = [path for path in paths if needs_two_passes(path)]
        if settings.two_pass is None and needing:
            logger.info("vllm-lora-ext: two_pass is on, for %s in --lora-modules", needing[0])
            given = dict(made.additional_config or {})
            made.additional_config = given | {KEY: {**given.get(KEY, {}), "two_pass": True}}
        return made

    return classmethod(from_cli_args)
