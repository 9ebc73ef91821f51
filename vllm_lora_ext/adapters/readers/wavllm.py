"""WavLLM (github.com/microsoft/SpeechT5, WavLLM): LoRA scaled by a gate of the instruction."""

from __future__ import annotations

import re

from vllm_lora_ext.adapters.folder import SIDECAR, AdapterFolder
from vllm_lora_ext.adapters.instruction_gate import GateLayers, InstructionTemplate
from vllm_lora_ext.adapters.model import LowRank, RoutedAdapter
from vllm_lora_ext.adapters.readers.base import Reader
from vllm_lora_ext.adapters.readers.names import group, part
from vllm_lora_ext.adapters.readers.peft_config import bad_value, whole_number
from vllm_lora_ext.adapters.readers.sidecar import check_system, every_layer
from vllm_lora_ext.adapters.readers.tuners import take_shaped
from vllm_lora_ext.errors import AdapterError

NAME = "wavllm"
_LLAMA = "gpt_model.model_llama."
_PART = re.compile(
    r"gpt_model\.model_llama\.(?P<module>layers\.(0|[1-9]\d{0,5})\.attention\.w[qkvo])"
    r"_(?P<part>lora_[AB])"
)
# What a whole checkpoint holds beside the adapter: the base model, and the audio front end.
_BASE = re.compile(
    r"gpt_model\.model_llama\.(tok_embeddings\.weight|norm\.weight|output\.weight"
    r"|layers\.\d+\.(attention\.w[qkvo]|feed_forward\.w[123]|attention_norm|ffn_norm)\.weight)"
    r"|(audio_encoder|wavlm_encoder|wavlm_audio_proj|audio_proj)\..+"
)
_ROTARY = ("wq", "wk")
_LAYOUTS = ("interleaved", "halves")
_MAX_HEAD = 1 << 16
_SETTINGS = {
    "system": f"{NAME} (may be left out)",
    "rope_layout": "order of the rows of wq and wk in each head: interleaved (as Meta's release of"
    " LLaMA and the authors' code have them) or halves (as transformers has them)",
    "head_size": "rows per attention head of the base model; a server knows it",
}


def detect(folder: AdapterFolder) -> bool:
    return not folder.has_config and any(map(_PART.fullmatch, folder.names))


def read(folder: AdapterFolder) -> RoutedAdapter:
    check_system(folder, NAME)
    layout = folder.setting("rope_layout", _SETTINGS["rope_layout"])
    if layout not in _LAYOUTS:
        raise bad_value(f"rope_layout in {SIDECAR}", layout, " | ".join(_LAYOUTS))
    groups = group(folder.names, _PART)
    kinds = sorted({name.rpartition(".")[2] for name in groups})
    every_layer(groups, [f"layers.{{}}.attention.{kind}" for kind in kinds])
    gate = _gate(folder)
    out = gate.second.shape[0]
    layers, rotary = {}, set()
    for short, parts in groups.items():
        name = _full_name(short)
        layers[name] = _low_rank(folder, short, parts, out)
        if layout == "interleaved" and short.endswith(_ROTARY):
            rotary.add(name)
    folder.skip(name for name in folder.names if _BASE.fullmatch(name))
    head_size = _head_size(folder, out)
    template = InstructionTemplate(layers, frozenset(rotary), gate, head_size)
    return RoutedAdapter({}, system=NAME, template=template)


def _full_name(short: str) -> str:
    _, layer, _, kind = short.split(".")
    return f"model.layers.{layer}.self_attn.{kind[1]}_proj"


def _gate(folder: AdapterFolder) -> GateLayers:
    first = take_shaped(folder, f"{_LLAMA}scale_fc_1.weight", None, None)
    second = take_shaped(folder, f"{_LLAMA}scale_fc_2.weight", None, len(first))
    return GateLayers(
        first, take_shaped(folder, f"{_LLAMA}scale_fc_1.bias", len(first)),
        second, take_shaped(folder, f"{_LLAMA}scale_fc_2.bias", len(second)),
        take_shaped(folder, f"{_LLAMA}scale_weight_attention.weight", 1, len(second)),
        take_shaped(folder, f"{_LLAMA}scale_weight_attention.bias", 1),
    )  # fmt: skip


def _low_rank(folder: AdapterFolder, name: str, parts: dict[str, str], out: int) -> LowRank:
    """A is stored [in, r] and B [r, out]; g, as long as every output, is all the scale there is."""
    a_KR = take_shaped(folder, part(parts, "lora_A", name), None, None)
    b_RN = take_shaped(folder, part(parts, "lora_B", name), a_KR.shape[1], out)
    return LowRank(a_KR.t().contiguous(), b_RN.t().contiguous())


def _head_size(folder: AdapterFolder, out: int) -> int | None:
    """What the sidecar and the served model say, where they say it."""
    size = folder.head_size
    if folder.has_setting("head_size"):
        given = folder.setting("head_size", _SETTINGS["head_size"])
        given = whole_number(given, f"head_size in {SIDECAR}", 2, _MAX_HEAD)
        if size not in (None, given):
            raise AdapterError(
                "setting_mismatch", f"head_size in {SIDECAR} is not the served model's", seen=given,
                limit=size, fix=f"remove it from {SIDECAR}",
            )  # fmt: skip
        size = given
    if size is not None and (size % 2 or out % size):
        raise AdapterError(
            "setting_mismatch", "the adapter's outputs are no whole number of attention heads of"
            " even size", seen=f"{out} outputs, heads of {size}", limit=f"a divisor of {out}",
            fix="serve it with the model it was trained on",
        )  # fmt: skip
    return size


READER = Reader(
    name=NAME,
    title="WavLLM",
    url="https://github.com/microsoft/SpeechT5/tree/main/WavLLM",
    files="final.safetensors or model.safetensors (final.pt through convert) with"
    " gpt_model.model_llama.layers.<layer>.attention.{wq,wk,wv,wo}_lora_{A,B}, scale_fc_1,"
    " scale_fc_2 and scale_weight_attention, routing.json with rope_layout; no"
    " adapter_config.json",
    peft_types=(),
    detect=detect,
    read=read,
    paper="WavLLM: Towards Robust and Adaptive Speech Large Language Model,"
    " https://arxiv.org/abs/2404.00656",
    summary="A gate over the outputs of every adapted layer, pooled from the base model's own"
    " hidden states over the request's instruction. The gate is folded into B: one adapter per"
    " instruction, made by the worker.",
    request="`instruction`, a text or ids; by default the last user message",
    formula="V_t = fc_2(gelu(fc_1(h_t))),  g = clamp(relu(sum_t softmax_t(w V_t) V_t), max 3)\n"
    "y = W x + g * (B A x),  h: the base model's last layer over the instruction, before the norm",
    settings=_SETTINGS,
    traps=(
        "g takes the place of alpha / r: lora_alpha is not used.",
        "The instruction is tokenised by itself, in quotation marks and without BOS; it is not a"
        " span of the prompt.",
        "wq and wk have the row order of Meta's release of LLaMA (interleaved rotary pairs), a"
        " base in the form of transformers has halves: B and g are both reordered for q and k, and"
        " neither for v and o.",
        "The hidden states are taken before the final norm.",
        "The authors' pooling has no padding mask: in a batch, their gate depends on the other"
        " prompts' lengths. Here it is that of the instruction alone.",
        "The audio encoders are not served: their tensors are left unread, and their outputs come"
        " to the server as prompt embeddings.",
        "lora_only_qv, scale_with_audio and scale_0_1 stand in the config, and the authors'"
        " inference code reads none of them.",
    ),
)
