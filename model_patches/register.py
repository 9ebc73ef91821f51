"""Every patch of vLLM, in one table: what, why, how, until when, and the code it was read against.

`targets.json` beside it holds the hash of each target's source in every vLLM release that was read
(`check.record` writes it). At start every target is compared; a changed one is refused with one
line, never patched blindly. This module imports no vLLM: the register can be held against a source
tree (`check`).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Target:
    """One object in vLLM's source: a function, method, class or module-level name."""

    module: str
    qualname: str

    def __str__(self) -> str:
        return f"{self.module}.{self.qualname}"


@dataclass(frozen=True)
class Patch:
    """A change to vLLM: `module` here holds its `apply()`."""

    name: str
    module: str
    why: str
    how: str
    upstream: str
    remove_when: str
    targets: tuple[Target, ...]

    def apply(self) -> None:
        import_module(f"vllm_lora_ext.model_patches.{self.module}").apply()


PATCHES: tuple[Patch, ...] = (
    Patch(
        name="lora-layers",
        module="layers",
        why=(
            "Stock adds one (A, B) pair per token; a routed adapter's delta needs gates "
            "between A and B, and stock's Python-level CPU ops freeze under torch.compile."
        ),
        how=(
            "Subclasses of the stock linear wrappers, put in their place in "
            "`_all_lora_classes`, and of the embedding wrapper."
        ),
        upstream=(
            "vllm-project/vllm#49705 (router-driven mixtures), #48421 and #49656 (index -1 on CPU)"
        ),
        remove_when="vLLM offers a hook for the delta of a LoRA layer.",
        targets=(
            Target("vllm.lora.utils", "_all_lora_classes"),
            Target("vllm.lora.utils", "from_layer"),
            Target("vllm.lora.layers.base", "BaseLayerWithLoRA.set_mapping"),
            Target("vllm.lora.layers.base_linear", "BaseLinearLayerWithLoRA.__init__"),
            Target("vllm.lora.layers.base_linear", "BaseLinearLayerWithLoRA.create_lora_weights"),
            Target("vllm.lora.layers.base_linear", "BaseLinearLayerWithLoRA.apply"),
            Target("vllm.lora.layers.base_linear", "BaseLinearLayerWithLoRA._apply_sync"),
            Target("vllm.lora.layers.base_linear", "BaseLinearLayerWithLoRA._apply_async_impl"),
            Target(
                "vllm.lora.layers.base_linear", "BaseLinearLayerWithLoRA._init_lora_stream_context"
            ),
            Target("vllm.utils.multi_stream_utils", "maybe_execute_in_parallel"),
            Target("vllm.lora.layers.base_linear", "BaseLinearLayerWithLoRA._apply_base_forward"),
            Target("vllm.lora.layers.base_linear", "BaseLinearLayerWithLoRA._apply_lora_to_output"),
            Target("vllm.lora.layers.column_parallel_linear", "ColumnParallelLinearWithLoRA"),
            Target("vllm.lora.layers.column_parallel_linear", "MergedColumnParallelLinearWithLoRA"),
            Target("vllm.lora.layers.column_parallel_linear", "QKVParallelLinearWithLoRA"),
            Target("vllm.lora.layers.column_parallel_linear", "MergedQKVParallelLinearWithLoRA"),
            Target(
                "vllm.lora.layers.column_parallel_linear",
                "MergedColumnParallelLinearVariableSliceWithLoRA",
            ),
            Target("vllm.lora.layers.row_parallel_linear", "RowParallelLinearWithLoRA"),
            Target("vllm.lora.layers.replicated_linear", "ReplicatedLinearWithLoRA"),
            Target("vllm.lora.layers.vocab_parallel_embedding", "VocabParallelEmbeddingWithLoRA"),
            Target("vllm.model_executor.layers.utils", "cpu_unquantized_gemm"),
            Target("vllm.model_executor.layers.linear", "UnquantizedLinearMethod.apply"),
            Target(
                "vllm.v1.worker.lora_model_runner_mixin", "LoRAModelRunnerMixin.reset_lora_state"
            ),
        ),
    ),
    Patch(
        name="step-map",
        module="punica",
        why=(
            "The op reads which slot each row uses when it runs; stock CPU ops wrap index -1 "
            "to the last slot."
        ),
        how=("A mixin before the platform's punica wrapper fills a StepMap in `update_metadata`."),
        upstream="vllm-project/vllm#48421, #49656",
        remove_when="vLLM's wrapper classes can be named by a plugin.",
        targets=(
            Target("vllm.lora.model_manager", "get_punica_wrapper"),
            Target("vllm.lora.punica_wrapper.punica_selector", "get_punica_wrapper"),
            Target("vllm.lora.punica_wrapper.punica_base", "PunicaWrapperBase.__init__"),
            Target("vllm.lora.punica_wrapper.punica_base", "PunicaWrapperBase.update_metadata"),
            Target("vllm.lora.punica_wrapper.punica_cpu", "PunicaWrapperCPU.__init__"),
            Target("vllm.lora.punica_wrapper.punica_cpu", "PunicaWrapperCPU.add_lora_logits"),
            Target("vllm.lora.layers.utils", "LoRAMapping"),
        ),
    ),
    Patch(
        name="adapter-manager",
        module="worker",
        why=(
            "Stock accepts NaN weights, wrong ranks and unknown layers, and a failed "
            "activation leaves a slot that answers from the base model."
        ),
        how=("Subclasses of the worker manager and (through `_manager_cls`) of the model manager."),
        upstream="vllm-project/vllm#51940, #51294",
        remove_when="vLLM takes a manager class from a plugin.",
        targets=(
            Target("vllm.v1.worker.lora_model_runner_mixin", "LRUCacheWorkerLoRAManager"),
            Target(
                "vllm.v1.worker.lora_model_runner_mixin", "LoRAModelRunnerMixin.load_lora_model"
            ),
            Target("vllm.lora.worker_manager", "WorkerLoRAManager.__init__"),
            Target("vllm.lora.worker_manager", "WorkerLoRAManager._load_adapter"),
            Target("vllm.lora.worker_manager", "WorkerLoRAManager.remove_adapter"),
            Target("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager"),
            Target("vllm.lora.model_manager", "LoRAModelManager.__init__"),
            Target("vllm.lora.model_manager", "LoRAModelManager.activate_adapter"),
            Target("vllm.lora.model_manager", "LoRAModelManager._deactivate_adapter"),
            Target("vllm.lora.model_manager", "LoRAModelManager._add_adapter"),
            Target("vllm.lora.model_manager", "LoRAModelManager.remove_all_adapters"),
            Target("vllm.lora.model_manager", "LoRAModelManager._register_packed_modules"),
            Target("vllm.lora.model_manager", "LoRAModelManager._match_target_modules"),
            Target("vllm.lora.model_manager", "LoRAModelManager.set_adapter_mapping"),
            Target("vllm.lora.model_manager", "LRUCacheLoRAModelManager"),
            Target("vllm.lora.lora_model", "LoRAModel.__init__"),
            Target("vllm.lora.utils", "parse_fine_tuned_lora_name"),
            Target("vllm.lora.utils", "get_adapter_absolute_path"),
            Target("vllm.lora.request", "LoRARequest"),
            Target("vllm.lora.model_manager", "LoRAModelManager._create_merged_loras_inplace"),
            Target("vllm.lora.model_manager", "LoRAModelManager._stack_moe_lora_weights"),
            Target("vllm.lora.model_manager", "LoRAModelManager._convert_3d_to_2d_moe_lora"),
            Target("vllm.lora.model_manager", "LoRAModelManager._validate_moe_lora_format"),
            Target("vllm.lora.model_manager", "LoRAModelManager._get_lora_layer_weights"),
            Target("vllm.lora.model_manager", "LoRAModelManager._get_module_to_save_weights"),
            Target("vllm.lora.lora_weights", "LoRALayerWeights"),
            Target("vllm.lora.lora_weights", "PackedLoRALayerWeights"),
            Target("vllm.lora.layers.classifier", "ClassificationHeadWithLoRA"),
            Target("vllm.lora.layers.fused_moe", "FusedMoEWithLoRA"),
            Target("vllm.lora.layers.fused_moe", "FusedMoE3DWithLoRA"),
        ),
    ),
    Patch(
        name="sleep",
        module="sleep",
        why=(
            "A sleep of level 2 throws away what the LoRA layers hold on the device, which vLLM "
            "does not write again when it wakes up."
        ),
        how="The LoRA manager is made under the memory tag that vLLM keeps on every level.",
        upstream="none yet",
        remove_when="vLLM keeps, or writes again, the slots of LoRA layers over a sleep.",
        targets=(
            Target("vllm.device_allocator", "get_mem_allocator_instance"),
            Target("vllm.device_allocator.cumem", "CuMemAllocator.use_memory_pool"),
            Target("vllm.device_allocator.sleep_mode_backend", "CuMemBackend.suspend"),
            Target("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager.create_lora_manager"),
        ),
    ),
    Patch(
        name="cpu-compile",
        module="cpu_platform",
        why=(
            "The CPU platform switches torch.compile off under LoRA, which alone halves base "
            "requests."
        ),
        how="`check_and_update_config` runs with the LoRA config hidden.",
        upstream="none yet",
        remove_when="the CPU platform keeps the compilation mode under LoRA.",
        targets=(Target("vllm.platforms.cpu", "CpuPlatform.check_and_update_config"),),
    ),
    Patch(
        name="settings",
        module="config",
        why="A wrong setting would end the start in every worker, after the weights were read.",
        how=(
            "Where the engine's configuration is made, the settings are checked against it; and a "
            "server sets `two_pass` where its own adapters need it."
        ),
        upstream="none yet",
        remove_when="vLLM lets a plugin check its part of the additional config.",
        targets=(
            Target("vllm.engine.arg_utils", "EngineArgs.create_engine_config"),
            Target("vllm.engine.arg_utils", "EngineArgs.from_cli_args"),
        ),
    ),
    Patch(
        name="compile-key",
        module="identity",
        why=(
            "Neither the plugin nor its version is in the keys of vLLM's compile caches, so that "
            "stock's graph would be loaded over the plugin's layers."
        ),
        how="The hash of the LoRA config, a factor of every key, holds that of the sources.",
        upstream="none yet",
        remove_when="vLLM hashes its general plugins into the key.",
        targets=(
            Target("vllm.config.lora", "LoRAConfig.compute_hash"),
            Target("vllm.config.vllm", "VllmConfig.compute_hash"),
            Target("vllm.compilation.caching", "aot_compile_hash_factors"),
        ),
    ),
    Patch(
        name="cpu-warm-start",
        module="warm_start",
        why="On a CPU vLLM fails to load every graph that it saved, and compiles at each start.",
        how="torch's compiled functions get the method that vLLM's loader asks them for.",
        upstream="none yet",
        remove_when="vLLM loads artefacts that are not its own backend's.",
        targets=(Target("vllm.compilation.decorators", "_try_load_aot_compiled_fn"),),
    ),
    Patch(
        name="worker-rpc",
        module="worker_rpc",
        why=(
            "Stock's add_lora takes no tensors, says nothing of what it evicts, and an error of "
            "one worker leaves the answers of the others in the queue."
        ),
        how=("More methods on the worker, whose errors are answers."),
        upstream="none yet",
        remove_when="vLLM's add_lora reports what it did.",
        targets=(
            Target("vllm.v1.worker.gpu_worker", "Worker.add_lora"),
            Target("vllm.v1.worker.worker_base", "WorkerWrapperBase.__getattr__"),
        ),
    ),
    Patch(
        name="engine-core",
        module="core",
        why=(
            "Stock's core schedules a request whatever became of its adapter, knows an adapter in"
            " the prefix cache by name and path whatever it holds, plans steps that need more"
            " slots than the pinned adapters leave, and lets a request wait for ever while those"
            " of the adapters in the slots keep coming."
        ),
        how=(
            "The core keeps a ledger of what its workers hold, has a request's adapter loaded "
            "before it is scheduled, keys blocks by the digest of the adapter's content and by"
            " what of it acts in the block, and has adapters take turns in the slots."
        ),
        upstream="none yet",
        remove_when=(
            "vLLM loads adapters before it schedules requests, hashes their content, and starves"
            " none."
        ),
        targets=(
            Target("vllm.v1.engine.core", "EngineCore.__init__"),
            Target("vllm.v1.engine.core", "EngineCore.add_request"),
            Target("vllm.v1.engine.core", "EngineCore.preprocess_add_request"),
            Target("vllm.v1.engine.core", "EngineCore.add_lora"),
            Target("vllm.v1.engine.core", "EngineCore.remove_lora"),
            Target("vllm.v1.engine.core", "EngineCore.list_loras"),
            Target("vllm.v1.engine.core", "EngineCore.pin_lora"),
            Target("vllm.v1.engine.core", "EngineCore.collective_rpc"),
            Target("vllm.v1.engine.core", "EngineCore.step"),
            Target("vllm.v1.engine.core", "EngineCore.step_with_batch_queue"),
            Target("vllm.v1.engine.core", "EngineCoreProc.has_work"),
            Target("vllm.v1.engine.core", "EngineCoreProc._invoke_utility_method"),
            Target("vllm.v1.engine.core", "EngineCoreProc._convert_msgspec_args"),
            Target("vllm.v1.engine.core", "EngineCoreProc._handle_client_request"),
            Target("vllm.v1.core.sched.scheduler", "Scheduler._handle_blocked_waiting_request"),
            Target("vllm.v1.core.sched.scheduler", "Scheduler._holds_kv_blocks"),
            Target("vllm.v1.core.sched.scheduler", "Scheduler.schedule"),
            Target("vllm.v1.core.sched.scheduler", "Scheduler.finish_requests"),
            Target("vllm.v1.core.kv_cache_utils", "_gen_lora_extra_hash_keys"),
            Target("vllm.v1.core.kv_cache_utils", "_gen_mm_extra_hash_keys"),
            Target("vllm.v1.core.kv_cache_utils", "generate_block_hash_extra_keys"),
            Target("vllm.v1.core.kv_cache_utils", "get_request_block_hasher"),
            Target("vllm.v1.request", "Request.__init__"),
            Target("vllm.v1.request", "Request.update_block_hashes"),
            Target("vllm.v1.engine.core_client", "InprocClient.add_request"),
            Target("vllm.v1.engine.core_client", "InprocClient.get_output"),
        ),
    ),
    Patch(
        name="refused-requests",
        module="refused",
        why=(
            "A request that the core ends with an error is answered with 500, and one to a "
            "pooling model ends the front end."
        ),
        how=(
            "`process_outputs` hands the error's own text and status to the caller; what makes an "
            "answer of an error gives ours their stable code as the type, and takes the paths of "
            "the server out of texts that nobody has typed."
        ),
        upstream="none yet",
        remove_when="vLLM's core can say why it refused a request (0.33 begins to).",
        targets=(
            Target("vllm.v1.engine.output_processor", "OutputProcessor.process_outputs"),
            Target("vllm.v1.engine.output_processor", "OutputProcessor._finish_request"),
            Target("vllm.v1.engine.output_processor", "RequestState.make_request_output"),
            Target("vllm.v1.engine", "EngineCoreOutput"),
            Target("vllm.exceptions", "GracefulHTTPError"),
            Target(
                "vllm.entrypoints.serve.exception_handling.error_response", "create_error_response"
            ),
            Target("vllm.entrypoints.serve.exception_handling.register", "init_exception_handler"),
            Target(
                "vllm.entrypoints.serve.exception_handling.handlers.exception", "exception_handler"
            ),
            Target("vllm.entrypoints.anthropic.api_router", "create_messages"),
            Target("vllm.entrypoints.serve.engine.serving", "BaseServing.create_error_response"),
        ),
    ),
    Patch(
        name="cpu-experts",
        module="cpu_moe",
        why=(
            "With LoRA on, a mixture-of-experts base takes Triton's experts on a CPU too, and dies "
            "in its first request."
        ),
        how=(
            "The backend is chosen as without LoRA, and fused experts get no wrapper; nothing but "
            "on a CPU."
        ),
        upstream="none yet",
        remove_when="the choice of the experts' backend looks at the platform first.",
        targets=(
            Target(
                "vllm.model_executor.layers.fused_moe.oracle.unquantized",
                "select_unquantized_moe_backend",
            ),
            Target(
                "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method",
                "select_unquantized_moe_backend",
            ),
            Target("vllm.model_executor.layers.fused_moe.config", "FusedMoEConfig"),
            Target("vllm.lora.layers.fused_moe", "FusedMoEWithLoRA.can_replace_layer"),
        ),
    ),
    Patch(
        name="packed-weights",
        module="packed_weights",
        why="On a CPU a base of int8 weights has none to look at, and LoRA's wrappers do.",
        how="Where a layer's weight is None, LoRA's tensors go where its scale lies.",
        upstream="none yet",
        remove_when="_get_lora_device knows of layers without a weight.",
        targets=(
            Target("vllm.lora.layers.utils", "_get_lora_device"),
            Target("vllm.lora.layers.base_linear", "_get_lora_device"),
            Target(
                "vllm.model_executor.kernels.linear.scaled_mm.cpu",
                "CPUInt8ScaledMMLinearKernel.process_weights_for_onednn",
            ),
        ),
    ),
    Patch(
        name="admission",
        module="admission",
        why="Stock loads a request's adapter inside a step, where a bad file ends the engine.",
        how=(
            "The first request that names an adapter has it loaded by `add_lora`, whose error "
            "goes to the caller; so has the first after somebody has called the workers."
        ),
        upstream="none yet",
        remove_when="vLLM loads adapters before it admits requests.",
        targets=(
            Target("vllm.v1.engine.llm_engine", "LLMEngine.add_request"),
            Target("vllm.v1.engine.llm_engine", "LLMEngine.add_lora"),
            Target("vllm.v1.engine.llm_engine", "LLMEngine.remove_lora"),
            Target("vllm.v1.engine.async_llm", "AsyncLLM.add_request"),
            Target("vllm.v1.engine.async_llm", "AsyncLLM.add_lora"),
            Target("vllm.v1.engine.async_llm", "AsyncLLM.remove_lora"),
            Target("vllm.v1.engine.llm_engine", "LLMEngine.collective_rpc"),
            Target("vllm.v1.engine.async_llm", "AsyncLLM.collective_rpc"),
            Target("vllm.v1.engine.llm_engine", "LLMEngine.pin_lora"),
            Target("vllm.v1.engine.async_llm", "AsyncLLM.pin_lora"),
            Target("vllm.v1.engine.llm_engine", "LLMEngine.collective_rpc"),
            Target("vllm.v1.engine.async_llm", "AsyncLLM.collective_rpc"),
            Target("vllm.v1.engine.core_client", "SyncMPClient.call_utility"),
            Target("vllm.v1.engine.core_client", "AsyncMPClient._call_utility_async"),
        ),
    ),
    Patch(
        name="dead-core",
        module="dead_core",
        why=(
            "When an engine core dies, stock forgets the calls that wait for its answer: an HTTP "
            "handler then waits for ever, and the server with it."
        ),
        how="What listens to a core ends the calls that wait, when it ends itself.",
        upstream="none yet",
        remove_when="vLLM ends utility calls when their engine core dies.",
        targets=(
            Target("vllm.v1.engine.core_client", "AsyncMPClient._ensure_output_queue_task"),
            Target("vllm.v1.engine.core_client", "AsyncMPClient._call_utility_async"),
            Target("vllm.v1.engine.core_client", "SyncMPClient.__init__"),
            Target("vllm.v1.engine.core_client", "SyncMPClient.call_utility"),
            Target("vllm.v1.engine.core_client", "BackgroundResources"),
        ),
    ),
    Patch(
        name="frontend",
        module="frontend",
        why=(
            "Stock answers every failed load with HTTP 500, loads nothing but folders, unloads "
            "without comparing, and warns of stale blocks that content in their keys rules out."
        ),
        how=(
            "One wrapper of the list of models: an AdapterError of the load route becomes 4xx with "
            "its stable code, a path may be a recipe's file, a mix may be a model, and an unload "
            "looks at the version under stock's lock; a filter of the module's log."
        ),
        upstream="none yet",
        remove_when="vLLM maps adapter errors to 4xx.",
        targets=(
            Target("vllm.entrypoints.openai.models.serving", "OpenAIServingModels.__init__"),
            Target(
                "vllm.entrypoints.openai.models.serving", "OpenAIServingModels.load_lora_adapter"
            ),
            Target(
                "vllm.entrypoints.openai.models.serving", "OpenAIServingModels.unload_lora_adapter"
            ),
            Target(
                "vllm.entrypoints.openai.models.serving",
                "OpenAIServingModels._check_unload_lora_adapter_request",
            ),
            Target(
                "vllm.entrypoints.openai.models.serving",
                "OpenAIServingModels.show_available_models",
            ),
            Target("vllm.entrypoints.openai.models.serving", "logger"),
        ),
    ),
    Patch(
        name="exchange",
        module="exchange",
        why="An answer does not say which content of its adapter gave it.",
        how=(
            "`system_fingerprint` of the classes that answer ends with the adapter's version, and a"
            " middleware puts it into a header."
        ),
        upstream="none yet",
        remove_when="vLLM's answers carry the version of their adapter.",
        targets=(
            Target("vllm.entrypoints.generate.base.serving", "GenerateBaseServing.__init__"),
            Target("vllm.entrypoints.serve.utils.fingerprint", "get_system_fingerprint"),
        ),
    ),
    Patch(
        name="adapter-routes",
        module="adapters_http",
        why=(
            "Stock lists adapters without their versions and loads them without comparing; its "
            "metrics cannot be extended from the engine's side."
        ),
        how=(
            "Two routes and two middlewares on the app that is handed to endpoint plugins, and one "
            "more field in the bodies of the load and unload routes."
        ),
        upstream="vllm-project/vllm#45820 (what a metric touches)",
        remove_when="vLLM loads endpoint plugins that an operator's setting turns on.",
        targets=(
            Target("vllm.plugins.endpoint_plugins.interface", "attach_endpoint_plugins"),
            Target("vllm.entrypoints.launchers.app", "build_app"),
            Target("vllm.entrypoints.serve.lora.api_router", "_attach_router"),
            Target("vllm.entrypoints.serve.lora.protocol", "LoadLoRAAdapterRequest"),
            Target("vllm.entrypoints.serve.lora.protocol", "UnloadLoRAAdapterRequest"),
            Target("vllm.v1.engine.core_client", "AsyncMPClient._call_utility_async"),
        ),
    ),
    Patch(
        name="versioned-outputs",
        module="versioned",
        why="An output does not say which content of its adapter gave it.",
        how="Requests carry the version they were promised, and their outputs get it.",
        upstream="vllm's own `weight_versions` (of base weights)",
        remove_when="vLLM's outputs carry the version of their adapter.",
        targets=(
            Target("vllm.v1.engine.output_processor", "RequestState.from_new_request"),
            Target("vllm.v1.engine.output_processor", "RequestState._new_request_output"),
            Target("vllm.outputs", "EmbeddingRequestOutput.from_base"),
            Target("vllm.outputs", "ClassificationRequestOutput.from_base"),
            Target("vllm.outputs", "ScoringRequestOutput.from_base"),
            Target("vllm.entrypoints.pooling.offline", "PoolingOfflineMixin.score"),
            Target(
                "vllm.entrypoints.generate.beam_search.offline",
                "BeamSearchOfflineMixin.beam_search",
            ),
            Target("vllm.v1.engine.output_processor", "OutputProcessor.add_request"),
        ),
    ),
    Patch(
        name="request-field",
        module="says_http",
        why="Stock drops fields of a request's body that it does not know, and one adapter is all.",
        how=(
            "`_check_model` parses the field `lora_ext` and answers what is wrong with it; "
            "`_maybe_get_adapters` returns a `LoRARequest` that carries it to `add_request`; what "
            "makes answers of the prompt's tokens holds it against them before a stream begins."
        ),
        upstream="vllm-project/vllm#51940 (several adapters), #52733 (scales)",
        remove_when="vLLM hands a request's extra fields to plugins.",
        targets=(
            Target("vllm.entrypoints.serve.engine.serving", "BaseServing._check_model"),
            Target("vllm.entrypoints.serve.engine.serving", "BaseServing._maybe_get_adapters"),
            Target("vllm.entrypoints.pooling.base.serving", "PoolingBaseServing._check_model"),
            Target("vllm.entrypoints.pooling.base.serving", "PoolingBaseServing._init_ctx"),
            Target("vllm.entrypoints.openai.models.serving", "OpenAIServingModels.model_name"),
            Target("vllm.v1.engine.async_llm", "AsyncLLM.generate"),
            Target(
                "vllm.entrypoints.generate.beam_search.online", "BeamSearchOnlineMixin.beam_search"
            ),
            Target(
                "vllm.entrypoints.openai.responses.serving",
                "OpenAIServingResponses._generate_with_builtin_tools",
            ),
        ),
    ),
    Patch(
        name="request-classes",
        module="request_classes",
        why="Classes of requests outside of OpenAI's API drop fields that they do not know.",
        how=(
            "They allow extra fields and are rebuilt, before FastAPI makes routes of them; what "
            "makes a chat of Anthropic's messages hands `lora_ext` on."
        ),
        upstream="none yet",
        remove_when="vLLM hands a request's extra fields to plugins.",
        targets=(
            Target("vllm.entrypoints.anthropic.protocol", "AnthropicMessagesRequest"),
            Target(
                "vllm.entrypoints.anthropic.serving", "AnthropicServingMessages._build_base_request"
            ),
            Target("vllm.entrypoints.scale_out.token_in_token_out.protocol", "GenerateRequest"),
            Target(
                "vllm.entrypoints.scale_out.token_in_token_out.serving",
                "ServingTokens.serve_tokens",
            ),
            Target("vllm.entrypoints.pooling.embed.protocol", "CohereEmbedRequest"),
        ),
    ),
    Patch(
        name="mixes",
        module="mixes",
        why="A LoRA resolver of vLLM's sees a name only, and caches under the spelling it got.",
        how=(
            "Where the setting `merge` is on, `_check_model` has a mix made and loaded and puts "
            "its canonical name into the request."
        ),
        upstream="none yet",
        remove_when="a resolver of vLLM's may change the request's name and answer with an error.",
        targets=(
            Target("vllm.entrypoints.serve.engine.serving", "BaseServing._check_model"),
            Target("vllm.entrypoints.serve.engine.serving", "BaseServing._maybe_get_adapters"),
            Target("vllm.entrypoints.pooling.base.serving", "PoolingBaseServing._check_model"),
            Target("vllm.entrypoints.serve.engine.serving", "BaseServing._check_model"),
            Target("vllm.entrypoints.serve.engine.serving", "BaseServing._maybe_get_adapters"),
            Target("vllm.entrypoints.pooling.base.serving", "PoolingBaseServing._check_model"),
        ),
    ),
    Patch(
        name="rows",
        module="rows",
        why="Nothing of vLLM tells a plugin which rows of a step belong to which request.",
        how=(
            "An engine's first LoRA manager wraps what gets the scheduler's output, what orders "
            "the rows and what selects those whose logits are computed, on both runners."
        ),
        upstream="vllm-project/vllm#28284 (routed experts of MoE base models)",
        remove_when="vLLM hands a plugin the requests of each row.",
        targets=(
            Target("vllm.v1.worker.gpu_worker", "Worker.execute_model"),
            Target(
                "vllm.v1.worker.lora_model_runner_mixin", "LoRAModelRunnerMixin.set_active_loras"
            ),
            Target(
                "vllm.v1.worker.lora_model_runner_mixin", "LoRAModelRunnerMixin._set_active_loras"
            ),
            Target("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._prepare_inputs"),
            Target("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._get_prompt_logprobs_dict"),
            Target("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.prepare_inputs"),
            Target("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.sample_tokens"),
            Target("vllm.v1.worker.gpu.model_runner", "ExecuteModelState"),
            Target("vllm.v1.core.sched.output", "NewRequestData"),
            Target("vllm.v1.core.sched.output", "CachedRequestData"),
        ),
    ),
    Patch(
        name="cpu-products",
        module="products",
        why=(
            "The product of a linear layer on a CPU is a handle that keeps where it reads and "
            "writes: what is computed of base weights beside a step would write over it."
        ),
        how="An engine's first LoRA manager on a CPU has steps hold a lock.",
        upstream="none yet",
        remove_when="vLLM's products on a CPU may be called by two threads.",
        targets=(
            Target("vllm.v1.worker.gpu_worker", "Worker.execute_model"),
            Target("vllm.v1.worker.gpu_worker", "Worker.sample_tokens"),
            Target("vllm.v1.worker.gpu_worker", "Worker.execute_dummy_batch"),
            Target("vllm.model_executor.layers.utils", "dispatch_cpu_unquantized_gemm"),
        ),
    ),
    Patch(
        name="graphs-without-sums",
        module="graphs",
        why=(
            "Under tensor parallelism a captured step sums over the ranks what gates may read, also"
            " where no adapter of the step has a gate."
        ),
        how=(
            "Such steps have graphs of their own: one more number of adapters in the key of "
            "vLLM's, on both runners. Only engines of several ranks with CUDA graphs."
        ),
        upstream="none yet",
        remove_when="the key of a graph may hold what a plugin says of the step.",
        targets=(
            Target(
                "vllm.v1.worker.lora_model_runner_mixin",
                "LoRAModelRunnerMixin.maybe_select_dummy_loras",
            ),
            Target("vllm.v1.cudagraph_dispatcher", "CudagraphDispatcher._get_lora_cases"),
            Target("vllm.v1.cudagraph_dispatcher", "CudagraphDispatcher.initialize_cudagraph_keys"),
            Target("vllm.v1.cudagraph_dispatcher", "CudagraphDispatcher.dispatch"),
            Target("vllm.lora.utils", "get_captured_lora_counts"),
            Target(
                "vllm.v1.worker.gpu_model_runner",
                "GPUModelRunner._determine_batch_execution_and_padding",
            ),
            Target("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._dummy_run"),
            Target("vllm.v1.worker.gpu.lora_utils", "get_num_active_loras_for_dispatch"),
            Target("vllm.v1.worker.gpu.lora_utils", "get_lora_capture_cases"),
            Target("vllm.v1.worker.gpu.lora_utils", "create_lora_capture_hook"),
            Target(
                "vllm.v1.worker.gpu.cudagraph_utils", "CudaGraphManager._build_lora_dispatch_map"
            ),
            Target("vllm.v1.worker.gpu.cudagraph_utils", "CudaGraphManager._init_candidates"),
            Target("vllm.v1.worker.gpu.cudagraph_utils", "CudaGraphManager.dispatch"),
            Target("vllm.v1.worker.gpu.cudagraph_utils", "ModelCudaGraphManager.__init__"),
            Target("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.execute_model"),
        ),
    ),
    Patch(
        name="instruction",
        module="instruction",
        why=(
            "A gate that the base model's own states give (WavLLM) needs what goes into its final "
            "norm, which a compiled model or a graph does not show."
        ),
        how=(
            "Steps with rows of an instruction run eagerly, on both runners, and hooks on the "
            "model and its final norm take their states; wrapped with the first such adapter."
        ),
        upstream="none yet",
        remove_when="vLLM hands a plugin the last hidden states of chosen requests.",
        targets=(
            Target(
                "vllm.v1.worker.gpu_model_runner",
                "GPUModelRunner._determine_batch_execution_and_padding",
            ),
            Target("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.execute_model"),
            Target("vllm.v1.worker.gpu.model_runner", "dispatch_cg_and_sync_dp"),
            Target("vllm.compilation.decorators", "_support_torch_compile"),
            Target("vllm.forward_context", "ForwardContext"),
            Target("vllm.v1.engine", "EngineCoreRequest"),
            Target("vllm.model_executor.models.llama", "LlamaModel.forward"),
        ),
    ),
    Patch(
        name="two-pass",
        module="two_pass",
        why=(
            "A gate that the base model's last hidden state of the same token gives (X-LoRA) needs "
            "a pass without adapters, and a KV cache for it, in the same step."
        ),
        how=(
            "With the setting `two_pass`: a twin of each attention layer in vLLM's table of layers,"
            " and a hook on the model that runs it once more, before, with the twins in their "
            "place."
        ),
        upstream="none yet",
        remove_when="vLLM runs a model twice in a step, with two KV caches for one block table.",
        targets=(
            Target("vllm.model_executor.layers.attention.attention", "Attention.__init__"),
            Target("vllm.model_executor.layers.attention.attention", "Attention.forward"),
            Target("vllm.model_executor.layers.attention.attention", "Attention.get_kv_cache_spec"),
            Target("vllm.model_executor.layers.attention.attention", "get_attention_context"),
            Target("vllm.model_executor.layers.attention.attention", "unified_kv_cache_update"),
            Target(
                "vllm.model_executor.layers.attention.attention", "unified_attention_with_output"
            ),
            Target("vllm.forward_context", "ForwardContext"),
            Target("vllm.forward_context", "override_forward_context"),
            Target("vllm.v1.worker.utils", "bind_kv_cache"),
            Target("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.get_kv_cache_spec"),
            Target("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.execute_model"),
            Target("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._model_forward"),
            Target("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.execute_model"),
            Target("vllm.v1.worker.gpu.attn_utils", "get_kv_cache_spec"),
            Target("vllm.model_executor.models.llama", "LlamaForCausalLM.forward"),
        ),
    ),
    Patch(
        name="rank-attention",
        module="rank_attention",
        why=(
            "An adapter whose A x attends to that of earlier tokens needs their keys and values, in"
            " the blocks of the request."
        ),
        how=(
            "With the setting `rank_attention`: attention layers of vLLM's own for the slices of "
            "linear layers, in vLLM's table of layers, called behind the op that adds B A x."
        ),
        upstream="none yet",
        remove_when="never: vLLM has no such adapters.",
        targets=(
            Target("vllm.model_executor.layers.attention.attention", "Attention.__init__"),
            Target("vllm.model_executor.layers.attention.attention", "Attention.forward"),
            Target("vllm.model_executor.layers.attention.attention", "Attention.get_kv_cache_spec"),
            Target("vllm.model_executor.layers.attention.attention", "get_attention_context"),
            Target("vllm.v1.worker.utils", "bind_kv_cache"),
            Target("vllm.v1.kv_cache_interface", "UniformTypeKVCacheSpecs"),
            Target("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.get_kv_cache_spec"),
            Target("vllm.v1.worker.gpu.attn_utils", "get_kv_cache_spec"),
        ),
    ),
    Patch(
        name="logits",
        module="logits",
        why=(
            "Stock takes prompt rows (`prompt_logprobs`) and rows of drafts for rows to sample "
            "from, and reads the output matrix's LoRA in every step."
        ),
        how="A subclass, put in its place, that looks up each row's slot.",
        upstream="vllm-project/vllm#48421, #49656",
        remove_when="vLLM's logits wrapper knows which rows it is given.",
        targets=(
            Target("vllm.lora.utils", "from_layer_logits_processor"),
            Target("vllm.lora.layers.logits_processor", "LogitsProcessorWithLoRA"),
            Target("vllm.model_executor.layers.logits_processor", "LogitsProcessor.forward"),
            Target("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.sample"),
            Target(
                "vllm.v1.worker.gpu.sample.prompt_logprob",
                "PromptLogprobsWorker.compute_prompt_token_id_logprobs",
            ),
            Target(
                "vllm.v1.worker.gpu.sample.prompt_logprob", "compute_prompt_logprobs_with_chunking"
            ),
        ),
    ),
    Patch(
        name="trace",
        module="trace",
        why="A trace is kept in the worker's process, and asked for from the front end's.",
        how="Only where the setting `trace` is on, the worker gets one more method.",
        upstream="vllm-project/vllm#28284 (routed experts of MoE base models)",
        remove_when="vLLM lets a plugin add a method to the worker.",
        targets=(Target("vllm.v1.serial_utils", "run_method"),),
    ),
    Patch(
        name="trace-route",
        module="trace_http",
        why=(
            "A traced request must be computed whole, not read from the prefix cache; and stock "
            "loads plugin routes only when VLLM_PLUGINS names them."
        ),
        how=(
            "`process_inputs` marks such a request; a GET route is added to the app that is "
            "handed to endpoint plugins."
        ),
        upstream="none yet",
        remove_when="vLLM loads endpoint plugins that an operator's setting turns on.",
        targets=(
            Target("vllm.v1.engine.input_processor", "InputProcessor.process_inputs"),
            Target("vllm.v1.engine.input_processor", "InputProcessor.assign_request_id"),
            Target("vllm.v1.engine.parallel_sampling", "ParentRequest.get_child_info"),
            Target("vllm.plugins.endpoint_plugins.interface", "attach_endpoint_plugins"),
            Target("vllm.entrypoints.launchers.app", "build_app"),
            Target("vllm.v1.engine.async_llm", "AsyncLLM.collective_rpc"),
        ),
    ),
    Patch(
        name="reward-route",
        module="rewards",
        why=(
            "A reward model of several adapters is one request to a client and many to the "
            "engine; stock loads plugin routes only when VLLM_PLUGINS names them."
        ),
        how="A POST route is added to the app that is handed to endpoint plugins.",
        upstream="none yet",
        remove_when="vLLM loads endpoint plugins that an operator's setting turns on.",
        targets=(
            Target("vllm.plugins.endpoint_plugins.interface", "attach_endpoint_plugins"),
            Target("vllm.entrypoints.launchers.app", "build_app"),
            Target("vllm.entrypoints.serve.utils.api_utils", "with_cancellation"),
            Target("vllm.inputs.engine", "tokens_input"),
            Target("vllm.v1.engine.async_llm", "AsyncLLM.encode"),
            Target("vllm.v1.engine.async_llm", "AsyncLLM.get_supported_tasks"),
            Target("vllm.config.model", "ModelConfig.get_pooling_task"),
            Target("vllm.pooling_params", "PoolingParams"),
        ),
    ),
    Patch(
        name="pooling-without-tokenizer",
        module="scoring",
        why=(
            "An engine for embeddings with `skip_tokenizer_init` does not start: the scores of "
            "pairs of texts, which it offers too, ask for the tokenizer."
        ),
        how="They are left out where there is no tokenizer.",
        upstream="none yet",
        remove_when="vLLM starts such an engine.",
        targets=(
            Target("vllm.entrypoints.pooling.utils", "enable_scoring_api"),
            Target("vllm.entrypoints.pooling.factories", "init_pooling_io_processors"),
        ),
    ),
)
