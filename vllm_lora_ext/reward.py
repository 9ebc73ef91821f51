"""A reward model of several adapters (DMoERM), offline: texts in, rewards out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_lora_ext.adapters.dmoerm import read_reward_model
from vllm_lora_ext.adapters.limits import RANKS, slot_rank
from vllm_lora_ext.adapters.reward_model import RewardAdapter
from vllm_lora_ext.engines import start_engine, stop_engine
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.serving.rewards import Judge, Reward


class RewardModel:
    """DMoERM's router, experts and heads over one vLLM engine.

    Args:
        adapter: the folder: `router/`, `innermoe/<category>/ckpts/`, `routing.json`.
        base: the model that all experts stand on: a folder, a name on the hub, or a running `LLM`
            with LoRA that pools the last hidden state.
        settings: what the files leave out, as `routing.json` would say it.
        router_device: where the router runs; it is a model of its own.
        engine_args: more options of vLLM's `LLM`.
    Raises:
        AdapterError: the reward model cannot be read, or is none for this base; several bases;
            `bad_settings`, `engine_failed`.
    """

    def __init__(
        self,
        adapter: str | os.PathLike[str],
        base: Any,
        settings: Mapping[str, Any] | None = None,
        router_device: str = "cpu",
        **engine_args: Any,
    ) -> None:
        loaded = read_reward_model(adapter, settings)
        check_one_base(base)
        self._own = isinstance(base, str | os.PathLike)
        self._llm = start_engine(engine_options(loaded, base) | engine_args) if self._own else base
        try:
            self._prepare(loaded, router_device)
        except BaseException:
            self.close()
            raise

    def _prepare(self, adapter: RewardAdapter, router_device: str) -> None:
        from vllm_lora_ext.model_patches.rewards import bounds_of, check_pooling

        config = self._llm.llm_engine.vllm_config.model_config
        check_pooling(config, self._llm.pooling_task if config.runner_type == "pooling" else None)
        self.note = adapter.one_base_note()
        self._judge = Judge(adapter, config.model, router_device, bounds_of(config))
        self._experts = {
            (category, number): self._llm.llm_engine.add_adapter(
                f"{adapter.digest[:12]}/{category}/{expert.point}", expert.tensors, expert.config
            )
            for category, number, expert in self._judge.each_expert()
        }

    def score(self, texts: Sequence[Mapping[str, Any]]) -> list[Reward]:
        """Category, its probabilities and the reward of each text.

        All passes of all texts go to the engine in one call, so that they share batches.

        Args:
            texts: each `{"router_ids": [...], "inner_ids": [...]}` or `{"messages": [...]}`, of a
                chat whose last message is the reply that is rewarded.
        Raises:
            AdapterError: `bad_value`, a text is malformed.
        """
        from vllm_lora_ext.model_patches.rewards import TASK, params

        readings = [self._judge.read(dict(t), f"texts[{i}]") for i, t in enumerate(texts)]
        if not readings:
            return []
        probs_TC = self._judge.route(readings)
        passes = self._judge.passes(readings, probs_TC)
        outputs = self._llm.encode(
            [{"prompt_token_ids": one.ids} for one in passes], params(), use_tqdm=False,
            lora_request=[self._experts[one.category, one.number] for one in passes],
            pooling_task=TASK,
        ) if passes else []  # fmt: skip
        return self._judge.rewards(probs_TC, passes, [o.outputs.data for o in outputs])

    def close(self) -> None:
        """Ends the engine, if it was started here."""
        if self._own:
            stop_engine(self._llm)


def check_one_base(base: object) -> None:
    """Raises AdapterError `unsupported_feature` where several base models are given."""
    if isinstance(base, list | tuple | dict):
        raise AdapterError(
            "unsupported_feature", "several base models are given, and one engine has one: the"
            " weights of a second do not fit into its layers, as an adapter's would",
            seen=list(map(str, base)), limit="one base model, on which all experts stand",
            fix="score the categories one after the other, each with an engine of its own base",
        )  # fmt: skip


def engine_options(adapter: RewardAdapter, base: Any) -> dict[str, Any]:
    """What vLLM's `LLM` needs to run the experts: those of one text share a step."""
    from vllm.config import PoolerConfig

    experts = sum(len(category.experts) for category in adapter.categories.values())
    return {
        "model": os.fspath(base), "runner": "pooling", "convert": "embed", "dtype": "float32",
        "pooler_config": PoolerConfig(seq_pooling_type="LAST"), "skip_tokenizer_init": True,
        "enable_lora": True, "max_loras": experts, "max_cpu_loras": experts,
        "max_lora_rank": slot_rank(adapter.rank) or RANKS[-1], "max_model_len": -1,
        "disable_log_stats": True, "seed": 0,
    }  # fmt: skip
