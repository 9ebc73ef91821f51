"""Which variants of the GPU kernels serving can reach: asked of the code that serves.

The warm-up of an engine is run on tensors without memory, for models of several shapes, and what
Triton would compile for its launches is kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# Name, multiprocessors, KiB of shared memory that a program may have.
GPUS = {"90": ("H100", 132, 227), "100": ("B200", 148, 227), "80": ("A100", 108, 163)}
# (most ranks, dtype) of an engine: --max-lora-rank, and fp32 to see that it is no worse. "fp16 on
# bf16" is --lora-dtype float16 on a model of bf16.
ENGINES = (
    (16, "bf16"), (32, "bf16"), (64, "bf16"), (128, "bf16"), (256, "bf16"), (512, "bf16"),
    (64, "fp16"), (64, "fp32"), (64, "fp16 on bf16"), (64, "bf16 on fp32"),
)  # fmt: skip
# K, and N of the slices, of a decoder layer: Llama-3.1-8B, and sizes that no power of two divides.
LLAMA = ((4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,)))
ODD = ((2880, (4096, 512, 512)), (4096, (2880,)), (576, (1536, 1536)), (1530, (570,)))
MAX_TOKENS, SLOTS = 2048, 8  # of a step; more rows change no choice
# By kernel, what has the dtype of the slots, and what that of the model.
DTYPES = {
    "shrink": ("a_ptr", "x_ptr"), "expand": ("b_ptr", "y_ptr"), "extended": ("b_ptr", "y_ptr"),
    "glu": ("b_ptr", "a_ptr"), "mix": ("b_ptr", "base_ptr"), "prefetch": ("b_ptr", "a_ptr"),
}  # fmt: skip
# The first is the dtype; the others make no other kernel of it, on a GPU.
UNNAMED = ("OPERAND", "EVEN_K", "EVEN_N", "WALK", "PARTS", "PTX")


@dataclass(frozen=True)
class Variant:
    """One thing that Triton compiles: a kernel's source with its types, constants and options."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: Any

    @property
    def sizes(self) -> dict[str, Any]:
        """The constants by their names."""
        names = self.kernel.arg_names
        return {names[k[0]] if isinstance(k, tuple) else k: v for k, v in self.constants.items()}

    @property
    def name(self) -> str:
        """What the table calls it; several variants may have one name."""
        shown = [
            f"{name.removeprefix('BLOCK_')} {value}"
            for name, value in self.sizes.items()
            if name.isupper() and name not in UNNAMED
        ]
        kernel = self.kernel.__name__.removesuffix("_kernel")
        slots, model = (self.signature[name].removeprefix("*") for name in DTYPES[kernel])
        dtype = slots if slots == model else f"{slots} on {model}"
        return f"{kernel} | {', '.join(shown)} | {dtype} | {self.options.num_warps}"


class Kept:
    """In place of a kernel: keeps what Triton would compile for its launches."""

    def __init__(self, kernel: Any, target: Any) -> None:
        from triton.compiler import make_backend
        from triton.runtime.jit import create_function_from_signature

        self.kernel, self.backend = kernel, make_backend(target)
        self.bind = create_function_from_signature(kernel.signature, kernel.params, self.backend)
        self.found: dict[str, Variant] = {}

    def __getitem__(self, _grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            bound, specialization, options = self.bind(*args, **kwargs)
            key = f"{specialization} {options}"
            if key not in self.found:
                packed = self.kernel._pack_args(
                    self.backend, kwargs, bound, specialization, options
                )
                made, signature, constants, attributes = packed
                self.found[key] = Variant(self.kernel, signature, constants, attributes, made)

        return launch


def variants(capability: str, engines: Iterable[tuple[int, str]] = ENGINES) -> list[Variant]:
    """Every variant of a GPU's engines, by what their warm-up launches."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from vllm_lora_ext.kernels.gated_lora.backends.triton import (
        expand,
        extended,
        glu,
        shrink,
        tuning,
        warmup,
    )
    from vllm_lora_ext.kernels.gated_lora.backends.triton import prefetch as fetching
    from vllm_lora_ext.kernels.mix_mlp.backends.triton import mix
    from vllm_lora_ext.kernels.mix_mlp.backends.triton import warmup as block_warmup

    name, processors, shared = GPUS[capability]
    device = tuning.Device(name, processors, shared * 1024)
    target = GPUTarget("cuda", int(capability), 32)
    kept, before = [], []
    for module in (shrink, expand, extended, glu, fetching, mix, warmup, block_warmup):
        for key, value in list(vars(module).items()):
            if isinstance(value, JITFunction) and key.endswith("_kernel"):
                kept.append(Kept(value, target))
                before.append((module, key, value))
                setattr(module, key, kept[-1])
            elif value is tuning.device_of:
                before.append((module, key, value))
                setattr(module, key, lambda _index: device)
    try:
        for rank, dtype in engines:
            for shapes in (LLAMA, ODD):
                _warm(shapes, rank, dtype)
    finally:
        for module, key, value in before:
            setattr(module, key, value)
    return [variant for kernel in kept for variant in kernel.found.values()]


def _warm(shapes: Any, rank: int, dtype: str) -> None:
    """What an engine does when it starts, without memory."""
    import torch

    from vllm_lora_ext.kernels.gated_lora import Site, StepMap, prefetch_in_order
    from vllm_lora_ext.kernels.gated_lora.backends import choice
    from vllm_lora_ext.kernels.gated_lora.backends.triton import warmup
    from vllm_lora_ext.kernels.gated_lora.codes import MOST_ACTIVATED
    from vllm_lora_ext.kernels.gated_lora.extension import fits
    from vllm_lora_ext.kernels.mix_mlp import BlockSite
    from vllm_lora_ext.kernels.mix_mlp.backends.triton import warmup as block_warmup

    named = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    kind, model = (named[part] for part in (dtype.split(" on ") * 2)[:2])
    step = StepMap(MAX_TOKENS, "meta", tiled=True)
    triton = choice.triton()
    sites = [Site(SLOTS, k, sizes, rank, rank, kind, "meta", triton) for k, sizes in shapes]
    for k, sizes in shapes:
        base_NK = torch.empty(sum(sizes), k, dtype=model, device="meta")
        # One slot of few routers: with more, fewer do.
        if kind == model and fits(base_NK, 1, len(sizes), rank, 8):
            sites.append(Site(1, k, sizes, rank, 8, kind, "meta", triton, base_NK=base_NK))
    halves = [s for s in sites if len(s.slice_sizes) == 2 and s.padded_rank <= MOST_ACTIVATED]
    for old in halves:  # gate and up, whose launch may activate too
        base_NK = None if old.extension is None else old.extension.base_NK
        limits = old.max_rank, old.max_router_rows
        k, slots = old.a_SRK.shape[2], len(old.a_SRK)
        site = Site(slots, k, old.slice_sizes, *limits, kind, "meta", triton, base_NK=base_NK)
        site.activation = "silu"
        sites.append(site)
    for site in sites:
        site.step = step
    prefetch_in_order(sites)
    warmup.warm(sites, MAX_TOKENS, model)
    blocks = [BlockSite(sites[2], sites[3], torch.relu, act_name="silu")]
    # fc1 and fc2, without a gate
    (k, sizes), limits = shapes[2], (rank, rank, kind)
    alone = Site(SLOTS, k, sizes[:1], *limits, "meta", triton)
    alone.step = step
    blocks.append(BlockSite(alone, sites[3], torch.relu, act_name="gelu"))
    if sites[2].slice_sizes[0] == sites[3].a_SRK.shape[2]:
        block_warmup.warm(blocks, MAX_TOKENS, model)
