"""LoRA layers whose delta goes through `kernels.gated_lora`.

Target: `vllm.lora.utils._all_lora_classes`, the tuple from which vLLM picks the wrapper of a
linear layer. Each stock linear wrapper gets a subclass of the same name, put in its place; which
layer a class may replace, tensor-parallel slicing and `forward` stay stock.
"""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import vllm.lora.utils as lora_utils
from vllm import envs
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.layers.vocab_parallel_embedding import VocabParallelEmbeddingWithLoRA
from vllm.model_executor.layers.linear import RowParallelLinear, UnquantizedLinearMethod
from vllm.utils.multi_stream_utils import maybe_execute_in_parallel

from vllm_lora_ext.adapters.model import RoutedModule
from vllm_lora_ext.kernels.gated_lora import (
    EmbeddingSite,
    Factors,
    Site,
    StepMap,
    activated_lora,
    begin,
    embedding_lora_,
    extended_linear,
    finish_,
    gated_lora_,
    gated_lora_into_,
    prefetch,
    register_site,
)
from vllm_lora_ext.kernels.gated_lora.extension import MOST_ROWS, fits
from vllm_lora_ext.model_patches.backend import building


class RoutedLinear(BaseLinearLayerWithLoRA):
    """Mixed in before a stock wrapper: weights live in a `Site`, the delta is one opaque op."""

    @classmethod
    def can_replace_layer(cls, source_layer, lora_config, *args, **kwargs) -> bool:  # type: ignore[no-untyped-def]
        # Stock has classes of its own for fully sharded LoRA; here it is a matter of the site.
        config = copy.copy(lora_config)
        config.fully_sharded_loras = False
        kwargs |= {"source_layer": source_layer, "lora_config": config}
        return super().can_replace_layer(*args, **kwargs)

    def create_lora_weights(self, max_loras, lora_config, model_config=None) -> None:  # type: ignore[no-untyped-def]
        self.lora_config = lora_config
        made = building()
        # Stock's dual-stream option: there, as here, an op around the base product and the delta.
        if not made.backend.on_device:
            self._enable_aux_cuda_stream = False
        if self.n_slices == 1:
            self.output_slices = (self.output_size,)
        rank = lora_config.max_lora_rank
        # Under tensor parallelism a row-parallel input is a shard, and its output a partial sum.
        self.x_is_shard = isinstance(self.base_layer, RowParallelLinear) and self.tp_size > 1
        width, sizes = self.input_size, self.output_slices
        x_part = y_part = None
        if lora_config.fully_sharded_loras and self.tp_size > 1:
            if self.x_is_shard:
                y_part = _part_of(self.output_size, self.tp_rank, self.tp_size)
                sizes = (y_part.stop - y_part.start,)
            else:
                x_part = _part_of(self.input_size, self.tp_rank, self.tp_size)
                width = x_part.stop - x_part.start
        self.reduces = self.x_is_shard or x_part is not None
        base_NK = self._extended(max_loras, lora_config) if made.extend else None
        if base_NK is not None:  # one launch, which waits for the product
            self._enable_aux_cuda_stream = False
        self.site = Site(
            max_loras, width, sizes, rank, made.router_rows,
            lora_config.lora_dtype, self.device, made.backend,
            tensor_model_parallel_all_reduce if self.reduces else None, made.graphs, x_part, y_part,
            base_NK,
        )  # fmt: skip
        self.handle = register_site(self.site)
        self._columns = sum(self.output_slices)
        # Where the linear of an MLP block on the kernels leaves its shrunk rows (`mlp`).
        self.memory: torch.Tensor | None = None
        # Only the shapes and dtypes of these are read (`create_dummy_lora`): no memory behind.
        stub = {"dtype": lora_config.lora_dtype, "device": "meta"}
        self.lora_a_stacked = tuple(
            torch.empty(max_loras, 1, rank, self.input_size, **stub) for _ in self.output_slices
        )
        self.lora_b_stacked = tuple(
            torch.empty(max_loras, 1, n, rank, **stub) for n in self.output_slices
        )
        self.follow_base()

    def _extended(self, max_loras: int, lora_config) -> torch.Tensor | None:  # type: ignore[no-untyped-def]
        """The base weight, where A and routers are to stand below it; None: they are not."""
        base = self.base_layer
        if self.reduces or type(base.quant_method) is not UnquantizedLinearMethod:
            return None
        if envs.VLLM_BATCH_INVARIANT:  # a row's bits then hang on its batch
            return None
        weight_NK = base.weight.data
        shape = sum(self.output_slices), self.input_size
        if weight_NK.dtype != lora_config.lora_dtype or tuple(weight_NK.shape) != shape:
            return None
        made = building()
        limits = lora_config.max_lora_rank, made.router_rows, made.extend
        return weight_NK if fits(weight_NK, max_loras, self.n_slices, *limits) else None

    def follow_base(self) -> None:
        """Where vLLM's product on a CPU is a function of the base layer's (unquantised weights),
        it is this layer's as well, and the path to its weights, which a compiled graph walks for
        every linear in every step, is no longer than without LoRA.

        An extended weight takes in the numbers, and the base layer has its memory.

        Again whenever vLLM has replaced the base weights, which makes new ones.
        """
        if self.site.extension is not None:
            self.site.extension.follow(self.base_layer.weight)
        product = vars(self.base_layer).get("cpu_linear")
        self.has_product = product is not None
        if self.has_product:
            self.cpu_linear = product

    def activate(self, name: str) -> None:
        """From now on a layer [gate | up] gives `act(gate) · up`; `name` as of the site's."""
        self.site.activation, self._columns = name, self.output_slices[0]
        self._enable_aux_cuda_stream = False  # stock's op would have the size of both

    def leave_in(self, memory: torch.Tensor) -> None:
        """From now on the shrink stays in `memory`, where the kernel of an MLP block reads and
        writes. Only an op that names what it changes may do that: a compiler could clone the memory
        between two ops of which one is stock's, which names nothing."""
        self.memory = memory
        self._enable_aux_cuda_stream = False

    def set_mapping(self, punica_wrapper) -> None:  # type: ignore[no-untyped-def]
        super().set_mapping(punica_wrapper)
        self.site.step = punica_wrapper.step_map

    def reset_lora(self, index: int) -> None:
        self.site.clear(index)

    def set_lora(self, index, lora_a, lora_b) -> None:  # type: ignore[no-untyped-def]
        """Stock's way in (warm-up's dummy adapters): plain LoRA, scale already in B."""
        if isinstance(lora_a, torch.Tensor):
            lora_a, lora_b = [lora_a], [lora_b]
        pairs = zip(lora_a, lora_b, strict=True)
        self.load(index, [None if a is None else RoutedModule(a, b) for a, b in pairs])

    def load(self, index: int, modules: Sequence[RoutedModule | None]) -> None:
        """Puts an adapter's part at this layer into slot `index`.

        Args:
            modules: one entry per slice, one for the whole fused layer, or as for `part_sizes`;
                unsharded.
        """
        self.site.write(index, self.sharded(modules))

    def sharded(self, modules: Sequence[RoutedModule | None]) -> list[RoutedModule | None]:
        """This rank's part of every slice; `modules` as for `load`."""
        if len(modules) != self.n_slices:
            modules = self._split(modules)
        if self.tp_size > 1:
            return [m and self._shard(i, m) for i, m in enumerate(modules)]
        return list(modules)

    def full_sizes(self) -> tuple[int, tuple[int, ...]]:
        """Unsharded in features, and out features of each slice."""
        base = self.base_layer
        if hasattr(base, "total_num_kv_heads"):
            kv = base.total_num_kv_heads
            v_size = getattr(base, "v_head_size", base.head_size)
            qkv = (base.total_num_heads * base.head_size, kv * base.head_size, kv * v_size)
            return base.input_size, qkv if self.n_slices == 3 else (sum(qkv),)
        if self.n_slices > 1:
            return base.input_size, tuple(base.output_sizes)
        return base.input_size, (base.output_size,)

    def part_sizes(self, parts: int) -> list[tuple[int, ...]]:
        """Unsharded out features of the slices that each part of an adapter covers, for as many
        parts: where a layer has more slices than its adapters have names, the first name stands for
        the slices in front (Qwen3.5's `in_proj_qkv` for three, beside `in_proj_z`)."""
        sizes = self.full_sizes()[1]
        first = len(sizes) - parts + 1
        return [sizes[:first], *((size,) for size in sizes[first:])]

    def _split(self, modules: Sequence[RoutedModule | None]) -> list[RoutedModule | None]:
        """One entry per slice; slices of the same module share its A and gate."""
        slices: list[RoutedModule | None] = []
        for module, sizes in zip(modules, self.part_sizes(len(modules)), strict=True):
            if module is None or len(sizes) == 1:
                slices += [module] * len(sizes)
            else:
                for end, size in zip(itertools.accumulate(sizes), sizes, strict=True):
                    slices.append(_outputs(module, operator.itemgetter(slice(end - size, end))))
        return slices

    def _shard(self, i: int, m: RoutedModule) -> RoutedModule:
        """This rank's part of slice `i`, by stock's own slicing."""
        if self.x_is_shard:
            rows = slice(None) if self.site.y_part is None else self.site.y_part
            return _outputs(_cut_x(m, self.slice_lora_a), operator.itemgetter(rows))
        m = _cut_x(m, self.site.own_x)
        if self.n_slices == 1:
            return _outputs(m, self.slice_lora_b)

        def cut(b: torch.Tensor) -> torch.Tensor:
            only: list[torch.Tensor | None] = [None] * self.n_slices
            only[i] = b
            part: torch.Tensor = self.slice_lora_b(only)[i]
            return part

        return _outputs(m, cut)

    def _apply_sync(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if self.site.extension is not None:
            y_TN = extended_linear(x.reshape(-1, x.shape[-1]), bias, self.handle, self._columns)
            return y_TN.view(*x.shape[:-1], self._columns)
        base = self if self.has_product else self.base_layer
        output = self._get_quant_method().apply(base, x, bias)
        return self._apply_lora_to_output(x, output)

    def _apply_lora_to_output(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        y_TN, x_TK = output.view(-1, output.shape[-1]), x.reshape(-1, x.shape[-1])
        if self.site.activation is not None:
            a_TI = activated_lora(y_TN, x_TK, self.handle, self._columns)
            return a_TI.view(*output.shape[:-1], self._columns)
        if self.memory is None:
            gated_lora_(y_TN, x_TK, self.handle)
        else:
            gated_lora_into_(y_TN, self.memory, x_TK, self.handle)
        return output

    def _apply_async_impl(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """With VLLM_LORA_ENABLE_DUAL_STREAM: the shrink, which needs only x, runs on a second
        stream beside the base product of a small step; only the expand waits for both."""
        x_TK = x.reshape(-1, x.shape[-1])
        # A larger step's product takes all of the GPU, and the shrink beside it its bandwidth.
        stream = self._lora_stream if len(x_TK) <= MOST_ROWS else None

        def base() -> torch.Tensor:
            return self._get_quant_method().apply(self.base_layer, x, bias)

        def first() -> torch.Tensor | None:
            u = begin(x_TK, self.site)
            # Where vLLM runs both on one stream, it would only be one launch more.
            beside = stream is not None and torch.cuda.current_stream() == stream
            if self.site.prefetches and beside:
                prefetch(x_TK, self.site)
            return u

        output, u = maybe_execute_in_parallel(base, first, *self._events, stream)
        finish_(output.view(-1, output.shape[-1]), x_TK, u, self.site)
        return output


class RoutedEmbedding(VocabParallelEmbeddingWithLoRA):
    """Stock's embedding wrapper reads stock's metadata; on CPU it takes the last slot's rows for
    base tokens and freezes shapes when traced. Here the delta is an opaque op."""

    def create_lora_weights(self, max_loras, lora_config, model_config=None) -> None:  # type: ignore[no-untyped-def]
        super().create_lora_weights(max_loras, lora_config, model_config)
        out, rank = self.base_layer.embedding_dim, lora_config.max_lora_rank
        b_SNR = self.lora_a_stacked.new_zeros(out, max_loras, rank).permute(1, 0, 2)
        self.lora_b_stacked = b_SNR[:, None]
        self.factors = Factors(max_loras, rank, b_SNR.device)
        step: StepMap = None  # type: ignore[assignment]  # set by `set_mapping`
        self.site = EmbeddingSite(self.lora_a_stacked, b_SNR, step, factors=self.factors)
        self.handle = register_site(self.site)

    def set_mapping(self, punica_wrapper) -> None:  # type: ignore[no-untyped-def]
        super().set_mapping(punica_wrapper)
        self.site.step = punica_wrapper.step_map

    def reset_lora(self, index: int) -> None:
        if index in self.site.used:
            self.site.used.discard(index)
            self.factors.clear(index)
            super().reset_lora(index)

    def set_lora(self, index, lora_a, lora_b) -> None:  # type: ignore[no-untyped-def]
        super().set_lora(index, lora_a, lora_b)
        self.site.used.add(index)
        self.factors.clear(index)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.base_layer.forward(x)
        embedding_lora_(output.view(-1, output.shape[-1]), x.reshape(-1), self.handle)
        return output


def _part_of(size: int, rank: int, ranks: int) -> slice:
    """The columns of one rank, as even as they can be."""
    return slice(rank * size // ranks, (rank + 1) * size // ranks)


def _outputs(m: RoutedModule, cut: Callable[[torch.Tensor], torch.Tensor]) -> RoutedModule:
    """The module for a part of its outputs: rows of B, and their magnitudes."""
    magnitude_N = m.magnitude_N
    if magnitude_N is not None:
        magnitude_N = cut(magnitude_N[:, None])[:, 0]
    return replace(m, b_NR=cut(m.b_NR), magnitude_N=magnitude_N)


def _cut_x(m: RoutedModule, cut: Callable[[torch.Tensor], torch.Tensor]) -> RoutedModule:
    """The module for a part of x."""
    return replace(
        m,
        a_RK=cut(m.a_RK),
        router_GK=None if m.router_GK is None else cut(m.router_GK),
        head_K=None if m.head_K is None else cut(m.head_K[None])[0],
    )


def apply() -> None:
    """Puts the subclasses before vLLM's own choice of wrapper."""
    stock = lora_utils._all_lora_classes
    lora_utils._all_lora_classes = tuple(_ours(cls) for cls in stock if not _is_sharded(cls))


def _is_sharded(stock: type) -> bool:
    """Whether a class only stands for another one that ours replaces, where LoRA is fully sharded,
    which ours are as well."""
    return issubclass(stock, BaseLinearLayerWithLoRA) and "Sharded" in stock.__name__


def _ours(stock: type) -> type:
    if stock is VocabParallelEmbeddingWithLoRA:
        return RoutedEmbedding
    if not issubclass(stock, BaseLinearLayerWithLoRA):
        return stock
    if issubclass(stock, RoutedLinear):
        return stock
    return type(stock.__name__, (RoutedLinear, stock), {"__module__": __name__})
