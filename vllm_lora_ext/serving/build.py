"""The merging process: jobs in on stdin, answers out on stdout, one JSON object a line.

A job is {recipe, folders, versions, lease, store, max_bytes, dtype, max_rank}, or {describe} with
the last four but the store; the answer {path, rank}, or {error} with the text of an AdapterError.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

import torch

from vllm_lora_ext.adapters.paths import without_paths
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging import save_peft
from vllm_lora_ext.merging.generate.embed import Embedder, sentence_embedder
from vllm_lora_ext.merging.generate.sg_lora import ExpertLibrary
from vllm_lora_ext.merging.recipes import Store, parse_recipe
from vllm_lora_ext.serving.leases import link_folder

NICENESS, TRIES = 10, 3


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One merge; its files are in the folder `lease` afterwards.

    Raises:
        AdapterError: those of merging; `rank_too_large`.
    """
    return _describe(job) if "describe" in job else _merge(job)


def _merge(job: dict[str, Any]) -> dict[str, Any]:
    recipe, store = parse_recipe(job["recipe"]), Store(Path(job["store"]), job["max_bytes"])
    folders = {name: Path(folder) for name, folder in job["folders"].items()}
    lease = Path(job["lease"])
    for left in reversed(range(TRIES)):
        built = store.get_or_build(
            recipe, folders.__getitem__, versions=job["versions"],
            dtype=getattr(torch, job["dtype"]), max_rank=job["max_rank"],
        )  # fmt: skip
        try:
            link_folder(built.path, lease)
            break
        except FileNotFoundError:  # another server's limit threw it out in this moment
            shutil.rmtree(lease, ignore_errors=True)
            if not left:
                raise
    return {"path": str(lease), "rank": built.rank}


def _describe(job: dict[str, Any]) -> dict[str, Any]:
    """SG-LoRA takes milliseconds; nothing is kept but the models."""
    described = job["describe"]
    factors = ExpertLibrary.load(described["library"]).generate(
        described["text"], _embedder(described["model"]),
        k=described["top_k"], temperature=described["temperature"],
    )  # fmt: skip
    if factors.rank > job["max_rank"]:
        raise AdapterError(
            "rank_too_large", "the chosen experts together have more ranks than a mix may have",
            seen=factors.rank, limit=job["max_rank"],
            fix="lower merge.describe.top_k, or raise --max-lora-rank",
        )  # fmt: skip
    save_peft(factors, job["lease"], getattr(torch, job["dtype"]))
    return {"path": job["lease"], "rank": factors.rank}


@lru_cache(maxsize=1)
def _embedder(folder: str) -> Embedder:
    return sentence_embedder(Path(folder))


def _answer(line: str) -> dict[str, Any]:
    try:
        job = json.loads(line)
        return run(job)
    except AdapterError as error:
        if error.code == "output_failed":  # the server's disk, not the client's mistake
            return _failed("the merge cannot be written", error)
        # Names became folders of the server on their way here; readers name what they were given.
        return {"error": without_paths(str(error), list(job.get("folders", ())))}
    except Exception as error:
        return _failed("the merge failed", error)


def _failed(what: str, error: Exception) -> dict[str, Any]:
    """Which files and folders were in the way is for the server's log, and not for its clients."""
    traceback.print_exception(error)
    return {"error": str(AdapterError(
        "merge_failed", what, seen=type(error.__cause__ or error).__name__,
        fix="the server's log says why",
    ))}  # fmt: skip


def main(jobs: TextIO, answers: TextIO) -> None:
    """Answers jobs until their end, which comes with the server's own."""
    for line in jobs:
        answers.write(json.dumps(_answer(line)) + "\n")
        answers.flush()


if __name__ == "__main__":
    os.nice(NICENESS)
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)  # what libraries print goes to the log
        main(sys.stdin, out)
