"""What training and evaluation share: the model, batches that share a prefix, greedy answers.

Every conversation opens with the same tokens (system prompt and user header). `PrefixBatcher`
runs them once per step and lets the whole batch attend to their keys and values: the same
arithmetic as one long row per item, at about half the tokens, and gradients still reach the
adapter through the prefix.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from base_model import ensure_base
from tasks import Item
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
IGNORED = -100

logging.disable_progress_bar()


def load(dtype: torch.dtype = torch.bfloat16, folder: Path | None = None):
    """A frozen model and its tokenizer; without `folder` the demo's base model."""
    folder = folder or ensure_base()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.requires_grad_(False).eval(), tokenizer


def prompt_ids(tokenizer, question: str) -> list[int]:
    """The question as the server sees it: chat template, ready for the answer."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
    )["input_ids"]


@dataclass
class Batch:
    """Items after the shared prefix. Rows are padded on the right."""

    ids_BL: torch.Tensor
    labels_BL: torch.Tensor  # the next token where it belongs to the answer, else IGNORED
    real_BL: torch.Tensor  # False on padding
    task_B: torch.Tensor


class PrefixBatcher:
    """Turns items into batches, and batches into the last hidden states after the prefix."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        one, other = prompt_ids(tokenizer, "a b"), prompt_ids(tokenizer, "9")
        length = next(i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y)
        self.prefix = one[:length]

    def batch(self, items: list[tuple[int, Item]]) -> Batch:
        end = self.tokenizer.eos_token_id
        rows = [
            (
                prompt_ids(self.tokenizer, item.question),
                [*self.tokenizer(item.answer, add_special_tokens=False)["input_ids"], end],
            )
            for _, item in items
        ]
        return self.rows(rows, [task for task, _ in items])

    def rows(self, rows: list[tuple[list[int], list[int]]], tasks: list[int]) -> Batch:
        """Of token ids, prompts and answers."""
        ids, labels = [], []
        end = self.tokenizer.eos_token_id
        for prompt, answer in rows:
            assert prompt[: len(self.prefix)] == self.prefix
            prompt = prompt[len(self.prefix) :]
            ids.append(prompt + answer[:-1])
            labels.append([IGNORED] * (len(prompt) - 1) + answer)
        width = max(map(len, ids))
        return Batch(
            torch.tensor([row + [end] * (width - len(row)) for row in ids]),
            torch.tensor([row + [IGNORED] * (width - len(row)) for row in labels]),
            torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in ids]),
            torch.tensor(tasks),
        )

    def prefix_cache(self, model) -> DynamicCache:
        cache = DynamicCache()
        model(torch.tensor([self.prefix]), past_key_values=cache, logits_to_keep=1)
        return cache

    def loss(self, model, batch: Batch, cache: DynamicCache) -> torch.Tensor:
        """Mean cross entropy of the answers' tokens. Uses the cache up."""
        return self.losses(model, batch, cache).mean()

    def losses(self, model, batch: Batch, cache: DynamicCache) -> torch.Tensor:
        """Cross entropy of each of the answers' tokens, row after row, [N]. Uses the cache up."""
        body, head = model.model, model.lm_head
        cache.batch_repeat_interleave(len(batch.ids_BL))
        seen_BP = torch.ones(len(batch.ids_BL), len(self.prefix), dtype=torch.bool)
        hidden_BLH = body(
            batch.ids_BL,
            attention_mask=torch.cat([seen_BP, batch.real_BL], dim=1).long(),
            past_key_values=cache,
        ).last_hidden_state
        answer_BL = batch.labels_BL != IGNORED
        logits_NV = head(hidden_BLH[answer_BL]).float()  # only answers pay for the vocabulary
        return F.cross_entropy(logits_NV, batch.labels_BL[answer_BL], reduction="none")


def epochs(items: list[tuple[int, Item]], size: int, seed: int) -> Iterator[list]:
    """Endless batches; every item once before any comes again."""
    order = random.Random(seed)
    left: list = []
    while True:
        while len(left) < size:
            left += order.sample(items, len(items))
        batch, left = left[:size], left[size:]
        yield batch


@torch.inference_mode()
def answers(model, tokenizer, questions: list[str], max_tokens: int = 32) -> list[str]:
    """Greedy answers, one batch."""
    rows = [prompt_ids(tokenizer, question) for question in questions]
    width = max(map(len, rows))
    end = tokenizer.eos_token_id
    ids = torch.tensor([[end] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False
    )
    return tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
