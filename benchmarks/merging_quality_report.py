"""Table and heat map of merging_quality.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

KEYS = ("as_it_comes", "tuned")


def show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"right answers, % of {report['items_per_task']} held-out questions a task")
    table.add_column("adapter")
    tasks = list(report["rows"][0]["as_it_comes"])
    for title in (*tasks, "mean", "lambda", *tasks, "mean"):
        table.add_column(title, justify="right")
    for row in report["rows"]:
        cells = _cells(row, "as_it_comes")
        if "tuned" in row:
            cells += [f"{row['lambda']:g}", *_cells(row, "tuned")]
        table.add_row(row["label"], *cells)
    Console(width=110).print(table)


def _cells(row: dict[str, Any], key: str) -> list[str]:
    return [f"{v:.0f}" for v in _with_mean(row[key])]


def _with_mean(accuracy: dict[str, float]) -> list[float]:
    values = list(accuracy.values())
    return [*values, sum(values) / len(values)]


def draw(report: dict[str, Any], file: Path) -> None:
    """A heat map: a line per adapter, the tasks as it comes on the left, tuned on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = report["rows"]
    columns = (*report["rows"][0]["as_it_comes"], "mean")
    figure, sides = plt.subplots(1, 2, figsize=(8.2, 0.27 * len(rows) + 1.3), sharey=True)
    titles = "as the method leaves it", "strength chosen on other items"
    for axes, key, title in zip(sides, KEYS, titles, strict=True):
        table = [
            _with_mean(row[key]) if key in row else [float("nan")] * len(columns) for row in rows
        ]
        axes.imshow(table, cmap="YlGn", vmin=0, vmax=125, aspect="auto")
        for y, line in enumerate(table):
            for x, value in enumerate(line):
                if value == value:
                    weight = "bold" if x == len(columns) - 1 else "normal"
                    axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=8,
                              weight=weight)  # fmt: skip
        axes.set_title(title, fontsize=9)
        axes.set_xticks(range(len(columns)), columns, fontsize=9)
        axes.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=8)
        axes.tick_params(length=0)
        axes.axvline(len(columns) - 1.5, color="white", linewidth=3)
        for y in range(1, len(rows)):
            if rows[y]["group"] != rows[y - 1]["group"]:
                axes.axhline(y - 0.5, color="black", linewidth=0.8)
        for edge in axes.spines.values():
            edge.set_visible(False)
    count = report["items_per_task"]
    figure.suptitle(f"Right answers, % of {count} held-out questions a task (SmolLM2-135M, three "
                    "adapters merged)", fontsize=10)  # fmt: skip
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)
