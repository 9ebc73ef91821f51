"""A trace as a picture: which expert ran where, and how much each did."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.trace.data import Trace

if TYPE_CHECKING:
    from pathlib import Path

_MOST_NAMES, _MOST_TOKENS, _PALETTE = 72, 96, 20


def picture(trace: Trace, path: str | os.PathLike[str], module: str = "") -> Path:
    """Draws a trace with matplotlib; the file's suffix says the format (png, svg, pdf).

    Left: a row per routed module, a column per token; the colour is the expert with the largest
    |weight|, paler the smaller that is beside the module's largest. A line stands between prompt
    and continuation; white was not computed. Right: every expert's mean weight per module.

    Args:
        module: only modules whose name contains it (`mlp`, `layers.3.`, `up_proj`).
    Raises:
        AdapterError: `bad_value`, no module is left to draw; `output_failed`, no matplotlib, or
            the file cannot be written.
    """
    from pathlib import Path

    weights = {name: w for name, w in trace.weights.items() if module in name}
    if not weights or not trace.token_ids:
        raise AdapterError(
            "bad_value", "the trace has no routed module of that name to draw", seen=module,
            limit=list(trace.weights)[:8], fix="trace a routed adapter, or name another module",
        )  # fmt: skip
    try:
        from matplotlib import colormaps
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
    except ImportError as error:
        raise AdapterError(
            "output_failed", "a picture needs matplotlib", fix="pip install matplotlib"
        ) from error
    experts = max(w.shape[1] for w in weights.values())
    few = experts <= _PALETTE
    colours = colormaps["tab10" if experts <= 10 else "tab20"] if few else colormaps["turbo"]
    palette = ListedColormap([colours(e if few else e / (experts - 1)) for e in range(experts)])
    size = _sizes(len(weights), len(trace.token_ids), experts)
    figure = Figure(figsize=(sum(size[:2]) + 2.4, size[2] + 1.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=size[:2])
    _tokens(left, trace, weights, palette)
    image = _means(right, weights, experts)
    figure.colorbar(image, ax=right, label="mean weight", fraction=0.08)
    if few:
        _legend(left, palette, experts)
    left.set_title(" · ".join(filter(None, (trace.system, os.path.basename(trace.adapter)))))
    left.title.set_fontsize(9)
    right.set_title("experts", fontsize=9)
    where = Path(path)
    try:
        figure.savefig(where)
    except (OSError, ValueError) as error:  # no such folder, no such format
        raise AdapterError(
            "output_failed", f"the picture cannot be written: {error}", seen=str(where),
            fix="name a .png, .svg or .pdf file in a folder that is there",
        ) from error  # fmt: skip
    return where


def _sizes(modules: int, tokens: int, experts: int) -> tuple[float, float, float]:
    """Inches: width of both panels, height."""
    width, means = min(18.0, max(3.5, 0.17 * tokens)), min(6.0, max(1.6, 0.22 * experts))
    return width, means, min(16.0, max(2.0, 0.15 * modules))


def _tokens(axes: Any, trace: Trace, weights: dict[str, torch.Tensor], palette: Any) -> None:
    rows = []
    for weight_TE in weights.values():
        strength_T, best_T = weight_TE.abs().max(dim=1)
        strength_T = strength_T / strength_T.nan_to_num().max().clamp(min=1e-30)
        rgb_T3 = torch.tensor(palette(best_T.numpy()))[:, :3]
        alpha_T1 = (0.25 + 0.75 * strength_T)[:, None].where(strength_T[:, None] > 0, 0.0)
        rows.append(1 - alpha_T1 * (1 - rgb_T3))  # on white; NaN, not computed, stays white
    axes.imshow(torch.stack(rows).numpy(), aspect="auto", interpolation="nearest")
    if 0 < trace.prompt_tokens < len(trace.token_ids):
        axes.axvline(trace.prompt_tokens - 0.5, color="black", linewidth=1)
    axes.set_yticks(*_names(list(weights)), fontsize=6)
    texts = trace.tokens or [str(i) for i in trace.token_ids]
    if len(texts) <= _MOST_TOKENS:
        # A $ would start a formula.
        plain = [t.replace("$", r"\$").replace("\n", "⏎") for t in texts]
        axes.set_xticks(range(len(texts)), plain, rotation=90, fontsize=6)
    axes.set_xlabel("token", fontsize=8)


def _means(axes: Any, weights: dict[str, torch.Tensor], experts: int) -> Any:
    means_ME = torch.full((len(weights), experts), float("nan"))
    for row, weight_TE in enumerate(weights.values()):
        means_ME[row, : weight_TE.shape[1]] = weight_TE.nanmean(dim=0)
    image = axes.imshow(means_ME.numpy(), aspect="auto", interpolation="nearest", cmap="viridis")
    axes.set_yticks([])
    step = max(1, experts // 12)
    axes.set_xticks(range(0, experts, step), range(0, experts, step), fontsize=6)
    axes.set_xlabel("expert", fontsize=8)
    return image


def _names(names: list[str]) -> tuple[list[int], list[str]]:
    """Rows that get a label, and the labels, without what all names share."""
    parts = [name.split(".") for name in names]
    shared = 0
    while len(names) > 1 and len({tuple(p[: shared + 1]) for p in parts}) == 1:
        shared += 1
    step = -(-len(names) // _MOST_NAMES)
    at = list(range(0, len(names), step))
    return at, [".".join(parts[i][shared:]) for i in at]


def _legend(axes: Any, palette: Any, experts: int) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=palette(e), label=str(e)) for e in range(experts)]
    axes.legend(
        handles=patches, title="expert", fontsize=6, title_fontsize=6, ncols=-(-experts // 10),
        loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False,
    )  # fmt: skip
