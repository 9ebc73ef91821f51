"""Every patch of vLLM, in one table: what, why, how, until when, and the code it was read against.

`Target.sha256` holds the hash of the target's source in each vLLM release it was checked on. At
start every target is compared; a changed one is refused with one line, never patched blindly.
This module imports no vLLM: the register can be held against a source tree (`check`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module


@dataclass(frozen=True)
class Target:
    """One object in vLLM's source: a function, method, class or module-level name."""

    module: str
    qualname: str
    sha256: dict[str, str] = field(default_factory=dict)

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


VERSIONS = ("0.32.0", "0.33.0")


def _both(sha256: str) -> dict[str, str]:
    return dict.fromkeys(VERSIONS, sha256)


def _each(*sha256: str) -> dict[str, str]:
    return dict(zip(VERSIONS, sha256, strict=True))


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
            "`_all_lora_classes`; on CPU also of the embedding wrapper."
        ),
        upstream=(
            "vllm-project/vllm#49705 (router-driven mixtures), #48421 and #49656 (index -1 on CPU)"
        ),
        remove_when="vLLM offers a hook for the delta of a LoRA layer.",
        targets=(
            Target(
                "vllm.lora.utils",
                "_all_lora_classes",
                _each(
                    "41570789c73e4e551f0480e44405b88afe8d5d1950b53a7840dbe3a2b182fb21",
                    "93de9f2e44192212ef97883a76f36bcddea0f274bfba66a6a6709b37ab3addaa",
                ),
            ),
            Target(
                "vllm.lora.utils",
                "from_layer",
                _both("1fc11bebf464e55f3379a80b867b2019e3f05d90ed89ef7c636bc01fc42e3600"),
            ),
            Target(
                "vllm.lora.layers.base",
                "BaseLayerWithLoRA.set_mapping",
                _both("580e8b23f2510dd618040f5316931b2a982af5cbfcc4db397e9bf7a848ffda2e"),
            ),
            Target(
                "vllm.lora.layers.base_linear",
                "BaseLinearLayerWithLoRA.__init__",
                _both("30abc9948a6a16abcf2d2ce0b02140869086240230d163e99a2bc6c4acda6973"),
            ),
            Target(
                "vllm.lora.layers.base_linear",
                "BaseLinearLayerWithLoRA.create_lora_weights",
                _both("739a401c3be2b9bdcbacab548763eca0bbf570eea9e7c61c5ddb5a32e799e25c"),
            ),
            Target(
                "vllm.lora.layers.base_linear",
                "BaseLinearLayerWithLoRA.apply",
                _both("b5fc1ba2be31ecaaecac20822f6e9aa2f2e84a9bf3d88502c0abe4498a252d7e"),
            ),
            Target(
                "vllm.lora.layers.base_linear",
                "BaseLinearLayerWithLoRA._apply_sync",
                _both("33d098db449f386d6f734d242867fb576e8e67113c472ca61c1ceaf05da681d2"),
            ),
            Target(
                "vllm.lora.layers.base_linear",
                "BaseLinearLayerWithLoRA._apply_async_impl",
                _both("860157f82a017d0fddbbd944c7b7a800e57af32587c5a8808f8b8a0bbde8b0be"),
            ),
            Target(
                "vllm.lora.layers.base_linear",
                "BaseLinearLayerWithLoRA._init_lora_stream_context",
                _both("66ac06269a67fc820dcf13946c7cae232c99959aac79fb2b412b17e3faba41ac"),
            ),
            Target(
                "vllm.utils.multi_stream_utils",
                "maybe_execute_in_parallel",
                _both("6c9c62d2e7004d57e38b6ed77ee4d26e8cb38a4cb873ff39772586b069fc8100"),
            ),
            Target(
                "vllm.lora.layers.base_linear",
                "BaseLinearLayerWithLoRA._apply_base_forward",
                _both("535c424f6f3a94f15d9a97aaba0bb2cc884209ef7a7bb634dca38d13831c04b6"),
            ),
            Target(
                "vllm.lora.layers.base_linear",
                "BaseLinearLayerWithLoRA._apply_lora_to_output",
                _both("d1645b1341b21d2332a5b1bc2b35c1bbb1a2de3d80e4d753fac1c4b8319811b7"),
            ),
            Target(
                "vllm.lora.layers.column_parallel_linear",
                "ColumnParallelLinearWithLoRA",
                _both("dd965059b0a3f51bef959b5c15e23ade5c7d1d0f732e87fefbb876a64702de4f"),
            ),
            Target(
                "vllm.lora.layers.column_parallel_linear",
                "MergedColumnParallelLinearWithLoRA",
                _both("f7a0d743ccb6bc69ffedb0c113a6bab4b44dacab1bc0663b50dc1bda7808363e"),
            ),
            Target(
                "vllm.lora.layers.column_parallel_linear",
                "QKVParallelLinearWithLoRA",
                _both("252901cb3fdec9a0c055bdb7cc123c255d3c9a6597979afcf69d2deb04a36361"),
            ),
            Target(
                "vllm.lora.layers.column_parallel_linear",
                "MergedQKVParallelLinearWithLoRA",
                _both("859d6cdcd468bad6cc3d6e33ee0ccdec5f1ed7378ffcefbf8bff63ff0ca108d2"),
            ),
            Target(
                "vllm.lora.layers.column_parallel_linear",
                "MergedColumnParallelLinearVariableSliceWithLoRA",
                _both("14677a1fd552ecd73290dc430b95da33875a19305e85211b502f8a595c6cfdce"),
            ),
            Target(
                "vllm.lora.layers.row_parallel_linear",
                "RowParallelLinearWithLoRA",
                _both("118d2ba84fe5a666d386d0d55e9c5a307b0389c687685a05b35ffd1bcd528852"),
            ),
            Target(
                "vllm.lora.layers.replicated_linear",
                "ReplicatedLinearWithLoRA",
                _both("1c9899f16aff643339b4a8c46ec31417afc250785f1e8e628cbd355e92f6530c"),
            ),
            Target(
                "vllm.lora.layers.vocab_parallel_embedding",
                "VocabParallelEmbeddingWithLoRA",
                _both("c6c225186b31f988fc250783ff6fce435c4545ecc9806612d1de2d9b6d249067"),
            ),
            Target(
                "vllm.model_executor.layers.utils",
                "cpu_unquantized_gemm",
                _both("cd52ade3e7be3efed02f8d086bedab933296f37e1cd2c9f422b9d5a6a3c0bbac"),
            ),
            Target(
                "vllm.model_executor.layers.linear",
                "UnquantizedLinearMethod.apply",
                _both("4a8240e8cfcc60d45f4c56a96c387d2c465095badeae2eb817e47affa38e6041"),
            ),
            Target(
                "vllm.v1.worker.lora_model_runner_mixin",
                "LoRAModelRunnerMixin.reset_lora_state",
                _both("fa0430a5f3695abe144738b16f1041540d882e1e889a18284f602b9eabed0727"),
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
            Target(
                "vllm.lora.model_manager",
                "get_punica_wrapper",
                _both("de403ab7d83ba23928b665337c08191e3d40ee989dfa84b74aca51bcdb949ee2"),
            ),
            Target(
                "vllm.lora.punica_wrapper.punica_selector",
                "get_punica_wrapper",
                _both("2f761e26be9291ae939860f345b19f18aefcb21a8d94b39329bc91cf0386b6c9"),
            ),
            Target(
                "vllm.lora.punica_wrapper.punica_base",
                "PunicaWrapperBase.__init__",
                _both("ffb35f12938c15462c4879102bef7fa210281dbcda22e038ebfe771a49563c75"),
            ),
            Target(
                "vllm.lora.punica_wrapper.punica_base",
                "PunicaWrapperBase.update_metadata",
                _both("2a944b8871a4e16bf8872c3cf10bb7fd92535027f76c0bc26db0e9f3917dd319"),
            ),
            Target(
                "vllm.lora.punica_wrapper.punica_cpu",
                "PunicaWrapperCPU.__init__",
                _both("0d93b9e6dfe8cc06d64ab510ec67113fc9feb6d18ff2cb5c547ad228a57dd46e"),
            ),
            Target(
                "vllm.lora.layers.utils",
                "LoRAMapping",
                _both("2ece42fe3a4430e7b783555e6cdc82bc9ef473e688e1f771b40e8073baffc5fe"),
            ),
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
            Target(
                "vllm.v1.worker.lora_model_runner_mixin",
                "LRUCacheWorkerLoRAManager",
                _both("c17f4a657ee9b20916d3e9bd72f1f0e62515e9ed5a93de9c9344fe8efa9095a2"),
            ),
            Target(
                "vllm.v1.worker.lora_model_runner_mixin",
                "LoRAModelRunnerMixin.load_lora_model",
                _each(
                    "186fbb3793a247ff3f4f00a011729574b56f28cdd217ab69bcef20932286ab5a",
                    "5b65d5d47b5c53b2f8e5471a7384f267cb2c4581112b5db3530dca0f8a573b22",
                ),
            ),
            Target(
                "vllm.lora.worker_manager",
                "WorkerLoRAManager.__init__",
                _both("9bfd64c5296a493269106fe00c906062e2f578826c40eefe5f95d533bcc85301"),
            ),
            Target(
                "vllm.lora.worker_manager",
                "WorkerLoRAManager._load_adapter",
                _each(
                    "0b052a4493e20f18191889f06ea416a0258975e0082e1dd3f6266b2f1ca63cc5",
                    "e0c286c9c7a7e29feb337fb25927271d0ee7e0b02175da59f57e380c58629c5b",
                ),
            ),
            Target(
                "vllm.lora.worker_manager",
                "WorkerLoRAManager.remove_adapter",
                _both("2101659fab9fa45c94c21dcceb9975ccd91dc3604f028b7cdb84235bee8e6780"),
            ),
            Target(
                "vllm.lora.worker_manager",
                "LRUCacheWorkerLoRAManager",
                _both("a9673b11f3e682f861506574b92cdedd53f619f2e14b6e991a6a6c13f085c1d5"),
            ),
            Target(
                "vllm.lora.model_manager",
                "LoRAModelManager.__init__",
                _each(
                    "cead7d6a7b99eb85551d2a0d4291d11bca0f6fad961e33c42553de6b2d1869a4",
                    "f20ed28576151f259754faffc4f7ae4c66e384b041b9849ceb5f8416730b02c9",
                ),
            ),
            Target(
                "vllm.lora.model_manager",
                "LoRAModelManager.activate_adapter",
                _each(
                    "ff6e9539601488dbd20b2ab256e97caca2d6afc9f0265d7f4d70726a06d89731",
                    "abc39d9f2a9ba13004a4b2d8bc24acbc2bd9a58c590ff5221c1ab61884dfd793",
                ),
            ),
            Target(
                "vllm.lora.model_manager",
                "LoRAModelManager._deactivate_adapter",
                _both("1ec79f0dbb0933b6bfadae97bd040c4d10bd002a43191b4a1cdd948e2e883540"),
            ),
            Target(
                "vllm.lora.model_manager",
                "LoRAModelManager._add_adapter",
                _both("e0f6b00444ac2231cf043ef151db79af8900b0bcb370ad0c1206c5dfe26f79e1"),
            ),
            Target(
                "vllm.lora.model_manager",
                "LoRAModelManager.remove_all_adapters",
                _both("494e02be4ad89a5e725fedb537e9a79c6b5d3ad28b5e8a9b69b4ba04204230f0"),
            ),
            Target(
                "vllm.lora.model_manager",
                "LoRAModelManager._register_packed_modules",
                _both("ce08fd632853e775eb103c7dd69af3a37a11cf59b18d3991ac217c7a5ec5bf55"),
            ),
            Target(
                "vllm.lora.model_manager",
                "LoRAModelManager.set_adapter_mapping",
                _both("4a9c357495bdf8b621074dfff155081a4055b18d0277db3966f85068fd2a0056"),
            ),
            Target(
                "vllm.lora.model_manager",
                "LRUCacheLoRAModelManager",
                _both("72250c312dd1283161c4b3b14d532796b9fd4103294071fb31c65b6b18c0e7e1"),
            ),
            Target(
                "vllm.lora.lora_model",
                "LoRAModel.__init__",
                _both("99d5d00914a37b3cb1ad16992c8d9e36d370f24da7c7b8c4876c096b0221ee3c"),
            ),
            Target(
                "vllm.lora.utils",
                "parse_fine_tuned_lora_name",
                _both("2544e2ea510d7239174cfac78e009fa12ad5b104dd213f49b28a9322f52ff041"),
            ),
            Target(
                "vllm.lora.utils",
                "get_adapter_absolute_path",
                _both("767481f7cdb61d50e12a89b5b3a61e2b88d836f8228850aac34274db12510985"),
            ),
            Target(
                "vllm.lora.request",
                "LoRARequest",
                _both("c45bcdab29519073b896dec966bee2ea4530d740a84321ceefdb7c2c432757e5"),
            ),
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
        targets=(
            Target(
                "vllm.platforms.cpu",
                "CpuPlatform.check_and_update_config",
                _each(
                    "8b709c18ef31440e6cab10f2d251feff34d206d198ca929d13c48591a4ff8bca",
                    "18877c491872510baf221feb8c9e9e90c52f4b83ca410719957188d54fd4830f",
                ),
            ),
        ),
    ),
    Patch(
        name="admission",
        module="admission",
        why="Stock loads a request's adapter inside a step, where a bad file ends the engine.",
        how=(
            "The first request that names an adapter has it loaded by `add_lora`, whose error "
            "goes to the caller."
        ),
        upstream="none yet",
        remove_when="vLLM loads adapters before it admits requests.",
        targets=(
            Target(
                "vllm.v1.engine.llm_engine",
                "LLMEngine.add_request",
                _both("3f7d16bb8dfa784c25e1104d63d54238a366d33d9c60527d022f2be8ea658877"),
            ),
            Target(
                "vllm.v1.engine.llm_engine",
                "LLMEngine.add_lora",
                _both("62692e01d0fe23f1708a5073f63fd5af63dde04eb638fcbb955436dc81edc9ac"),
            ),
            Target(
                "vllm.v1.engine.llm_engine",
                "LLMEngine.remove_lora",
                _both("16328c2073e7dc4043e8a98ab659847f7a62b07a323f61eb47d30506bceee5a6"),
            ),
            Target(
                "vllm.v1.engine.async_llm",
                "AsyncLLM.add_request",
                _both("517ec631e057872118d2da4661fa9e3be73ac0fe29aaf1acc6a1a691c13e59b5"),
            ),
            Target(
                "vllm.v1.engine.async_llm",
                "AsyncLLM.add_lora",
                _both("c823e2ebee032ab2c9b7e806264d512ccab45bda9537ed3cea186b50ab648787"),
            ),
            Target(
                "vllm.v1.engine.async_llm",
                "AsyncLLM.remove_lora",
                _both("4240fe80745bdc861dd38b0a980fc701a3d381d315f47353b064100c61a68d85"),
            ),
        ),
    ),
    Patch(
        name="http-errors",
        module="http",
        why="Stock answers every failed load with HTTP 500.",
        how="The load route's handler turns an AdapterError into 4xx with its stable code.",
        upstream="none yet",
        remove_when="vLLM maps adapter errors to 4xx.",
        targets=(
            Target(
                "vllm.entrypoints.openai.models.serving",
                "OpenAIServingModels.__init__",
                _both("97391ff92cab28325d6a026b132b7862e381b9e24ac61c895a1091a336578836"),
            ),
            Target(
                "vllm.entrypoints.openai.models.serving",
                "OpenAIServingModels.load_lora_adapter",
                _each(
                    "9dba183afe32ba8cee6457edc574e475f9a06ff0dcf7e0f13ef8175f089f8cf9",
                    "6c254e77834c6a99a4ec93f222f6b5ea64cd00dbdde81fa598994002e6469754",
                ),
            ),
        ),
    ),
    Patch(
        name="mixes",
        module="mixes",
        why="A LoRA resolver of vLLM's sees a name only, and caches under the spelling it got.",
        how=(
            "Where the setting `merge` is on, `_check_model` has a mix made and loaded and puts "
            "its canonical name into the request; the load route takes recipe files."
        ),
        upstream="none yet",
        remove_when="a resolver of vLLM's may change the request's name and answer with an error.",
        targets=(
            Target(
                "vllm.entrypoints.serve.engine.serving",
                "BaseServing._check_model",
                _both("4283bcce850996929fb5b2ae5d3d2fae59a2689a5b1b1d01c5b183adcbf31479"),
            ),
            Target(
                "vllm.entrypoints.serve.engine.serving",
                "BaseServing._maybe_get_adapters",
                _both("0f87af69bead7a608dfc16e2c2a144d113f53f9b5339733b03758982c16555ee"),
            ),
            Target(
                "vllm.entrypoints.pooling.base.serving",
                "PoolingBaseServing._check_model",
                _both("5855b593bf8c9958644047bf3665ee5841e977077a3ca6f2b8ff1b2e0c041e44"),
            ),
            Target(
                "vllm.entrypoints.openai.models.serving",
                "OpenAIServingModels.unload_lora_adapter",
                _both("3fd9f4a38fddb98ed492e75b381c7bc54e2f4d0b8d385eed815e35cd8952cc8f"),
            ),
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
            Target(
                "vllm.v1.worker.gpu_worker",
                "Worker.execute_model",
                _both("c22e94e861941ece39dcbdc8db62ff8307a7d84054773f3ad78ed8f58b50d958"),
            ),
            Target(
                "vllm.v1.worker.lora_model_runner_mixin",
                "LoRAModelRunnerMixin.set_active_loras",
                _both("3c6d09584f64cc080650fc098e2d8ab258fe158f625e0f865b731c7c147b91b8"),
            ),
            Target(
                "vllm.v1.worker.lora_model_runner_mixin",
                "LoRAModelRunnerMixin._set_active_loras",
                _both("993df1afd7fca4db52ef17198ede4ee2f7ed84ebd9e2ca08062ffb5613e04067"),
            ),
            Target(
                "vllm.v1.worker.gpu_model_runner",
                "GPUModelRunner._prepare_inputs",
                _both("dad567e8b3e55f8c4fc52bc6575d553c06fa80138b4665613c4c1fbc9d4554b8"),
            ),
            Target(
                "vllm.v1.worker.gpu_model_runner",
                "GPUModelRunner._get_prompt_logprobs_dict",
                _both("f2e2ad4c2b6202a6a50d62f193de300f850fb18127c1e035eca8282120477318"),
            ),
            Target(
                "vllm.v1.worker.gpu.model_runner",
                "GPUModelRunner.prepare_inputs",
                _each(
                    "0ee8e8581f74b3796269f43f73e84bb01cbbe0591c2500f5ea06ec3b692fa36d",
                    "b6bf942b2ea1af3d0ddb02209cffcd6c276da0535dbb095f6ff5ae74963a9e42",
                ),
            ),
            Target(
                "vllm.v1.worker.gpu.model_runner",
                "GPUModelRunner.sample_tokens",
                _each(
                    "d38ff36c63734cca31facef59c9058454fe93dd3d08fd87755ab4fa7005ee9ef",
                    "ced2b8b84c83a9507e93f2fb8112f848a997c43f97a8c5320c4007db39b2b121",
                ),
            ),
            Target(
                "vllm.v1.worker.gpu.model_runner",
                "ExecuteModelState",
                _both("beed86d131e2287276410a2199bc02c1af6f31bfa780e074ca769f142f248bab"),
            ),
            Target(
                "vllm.v1.core.sched.output",
                "NewRequestData",
                _both("b19daee6418097710cd0baa41d036f5e72a30e4382e68b2567c7e7d9bdc0e541"),
            ),
            Target(
                "vllm.v1.core.sched.output",
                "CachedRequestData",
                _both("75d4d5e18bb8b14e992efd0284b79318ee3c013e1a325e6d9b3590b3ff385ad0"),
            ),
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
            Target(
                "vllm.lora.utils",
                "from_layer_logits_processor",
                _both("04b4b8dd2d12a4ae8788fc9e5ab8763f5ac899f5ff71ce7f2c8315f872567343"),
            ),
            Target(
                "vllm.lora.layers.logits_processor",
                "LogitsProcessorWithLoRA",
                _both("a9278dd48fd28f203c457f99e695e22fc13c87ac7c11907a34a3cd291bb873d8"),
            ),
            Target(
                "vllm.model_executor.layers.logits_processor",
                "LogitsProcessor.forward",
                _both("f9a3ed1c63d4383c0d394261d8a815ca15bf9590be1b9f43ce6e06d483a6f254"),
            ),
            Target(
                "vllm.v1.worker.gpu.model_runner",
                "GPUModelRunner.sample",
                _both("20088238536e47584dc1872a239e84309e9a66e585be2fcca7ca5343ab1b0875"),
            ),
            Target(
                "vllm.v1.worker.gpu.sample.prompt_logprob",
                "PromptLogprobsWorker.compute_prompt_token_id_logprobs",
                _both("ab9fcd2ae3ecc62ff813d93c2eaf9d0aa9aad0618f9820f10353a9c753af98da"),
            ),
            Target(
                "vllm.v1.worker.gpu.sample.prompt_logprob",
                "compute_prompt_logprobs_with_chunking",
                _both("b2fe8c4fa910a198d35b500de82e05abaddd934a13729e1ff44b82c4a2fb310f"),
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
        targets=(
            Target(
                "vllm.v1.serial_utils",
                "run_method",
                _both("7b7b64d2db5da12180ed144f98d669c2f211eb134945a514e7cf724b932c5fd4"),
            ),
        ),
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
            Target(
                "vllm.v1.engine.input_processor",
                "InputProcessor.process_inputs",
                _both("1ca6e1d0cbe81c3505a3ef5eefa2f6df7e6a0dab0165a442a62baf30059b4939"),
            ),
            Target(
                "vllm.v1.engine.input_processor",
                "InputProcessor.assign_request_id",
                _both("e7d0dfc5ea5d5f86799375f81c32ec5eda8d1fad3efc63a005d6dfd57aeeb397"),
            ),
            Target(
                "vllm.v1.engine.parallel_sampling",
                "ParentRequest.get_child_info",
                _both("d41028ae0bf95f4509844d7f7296dc14c098feb70d5d6cd79ded29fb4cdceebd"),
            ),
            Target(
                "vllm.plugins.endpoint_plugins.interface",
                "attach_endpoint_plugins",
                _both("f87a4ce1e3a21b527fc8dc095a86cad95c153037d84fd76009e363bc2de207ef"),
            ),
            Target(
                "vllm.entrypoints.launchers.app",
                "build_app",
                _both("1d16ca92cb2cb79a122505f31a0dc263f88ac89079106d869ee008d21cdfc02c"),
            ),
            Target(
                "vllm.v1.engine.async_llm",
                "AsyncLLM.collective_rpc",
                _both("84fe7a73925b2dbee44b1643ad32e394cf21b1be1a13c8f4b8504680fdb691fc"),
            ),
        ),
    ),
)
