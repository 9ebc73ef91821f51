"""What `rl_loop.py` trains: a plain LoRA of PEFT's, and the routers of a routed adapter.

A policy says what it is as tensors and a config, the way its folder would hold it, and takes one
step of policy gradient on answers that the engine sampled from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from smollm import LINEARS, PrefixBatcher, load
from tasks import ADAPTERS, TASKS, Item, training
from train_adapters import ALPHA, FIRST_LAYER, RANK, fit, with_lora
from train_router import Experts

from vllm_lora_ext.routing import GateSpec

DENSE = GateSpec(source="router", blocks=(RANK,) * len(TASKS), score="softmax")


@dataclass(frozen=True)
class Rollout:
    """A sampled answer.

    Args:
        answer: its token ids; logprobs: their log-probabilities, as the engine saw them.
        advantage: how much better it is than the other answers to its question.
    """

    item: Item
    prompt: list[int]
    answer: list[int]
    logprobs: list[float]
    advantage: float


class Policy:
    """The model that is trained.

    Args:
        model: the base model with the adapter in it; weights: what is trained.
    """

    def __init__(self, model: Any, tokenizer: Any, weights: list[torch.Tensor], rate: float):
        self._model, self._weights = model, weights
        self._batcher = PrefixBatcher(tokenizer)
        self._optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)

    def improve(self, rollouts: list[Rollout]) -> float:
        """One step of policy gradient.

        Returns:
            Mean distance of the log-probabilities computed here from the engine's: rounding, if
            the answers came from these very weights.
        """
        rows = [(rollout.prompt, rollout.answer) for rollout in rollouts]
        batch = self._batcher.rows(rows, [0] * len(rows))
        lengths = torch.tensor([len(rollout.answer) for rollout in rollouts])
        advantage_N = torch.tensor([r.advantage for r in rollouts]).repeat_interleave(lengths)
        losses_N = self._batcher.losses(self._model, batch, self._batcher.prefix_cache(self._model))
        (advantage_N * losses_N).mean().backward()
        torch.nn.utils.clip_grad_norm_(self._weights, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        engine_N = torch.tensor([x for rollout in rollouts for x in rollout.logprobs])
        return (losses_N.detach() + engine_N).abs().mean().item()


class Plain(Policy):
    """A LoRA adapter of PEFT's, after a few supervised steps that show it the form of an answer."""

    name, tasks = "plain", ("date",)

    def __init__(self, warm: int, rate: float = 2e-3) -> None:
        torch.manual_seed(0)
        model, tokenizer = load()
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(LINEARS))
        self._peft = with_lora(model, config, range(FIRST_LAYER, model.config.num_hidden_layers))
        items = [(0, item) for item in training(self.tasks[0])]
        fit(self._peft, tokenizer, items, steps=warm, rate=3e-3, label="warm start")
        weights = [weight for weight in self._peft.parameters() if weight.requires_grad]
        super().__init__(self._peft.get_base_model(), tokenizer, weights, rate)

    def adapter(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and config, as PEFT saves them."""
        return get_peft_model_state_dict(self._peft), self._peft.peft_config["default"].to_dict()


class Routed(Policy):
    """Routers over the demo's three skills, which stay as they are; at first all weigh the same."""

    name, tasks = "routed", tuple(TASKS)

    def __init__(self, rate: float = 2e-3) -> None:
        model, tokenizer = load()
        self._experts = Experts(model, [ADAPTERS / task for task in TASKS], DENSE)
        for module, a_RK in self._experts.a.items():
            router_GK = torch.zeros(len(TASKS), a_RK.shape[1], requires_grad=True)
            self._experts.router[module] = router_GK
        super().__init__(model, tokenizer, list(self._experts.router.values()), rate)

    def improve(self, rollouts: list[Rollout]) -> float:
        distance = super().improve(rollouts)
        self._experts.logits.clear()
        return distance

    def adapter(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and config in the native format."""
        parts = {
            "lora_A": self._experts.a,
            "lora_B": self._experts.b,
            "router": self._experts.router,
        }
        tensors = {
            f"{module}.{part}.weight": tensor
            for part, modules in parts.items()
            for module, tensor in modules.items()
        }
        config = {
            "peft_type": "ROUTED_LORA", "format_version": 1, "system": "rl",
            "target_modules": sorted(self._experts.a),
            "routing": {"default": DENSE.to_dict(), "modules": {}},
        }  # fmt: skip
        return tensors, config
