"""`merge`: several adapters into one ordinary adapter, by a recipe or by plain arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from vllm_lora_ext.cli.bundle import named_values
from vllm_lora_ext.cli.output import Dtype, Json, fail, parse_settings, print_json, table
from vllm_lora_ext.errors import AdapterError


def merge(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE.yaml]", help="a recipe; see docs/recipes.md")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="a new folder for the merged adapter")] = None,
    method: Annotated[
        str | None, typer.Option(help="in place of a recipe; --list names them")
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter", metavar="NAME=DIR[:WEIGHT]", help="an ordinary adapter; repeat it"
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="largest rank of the result")] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="a parameter of the method (density=0.3); repeat it"
        ),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="refuse adapters of any other base model")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="of the files; float32 when unsaid")] = None,
    listing: Annotated[bool, typer.Option("--list", help="list the methods and end")] = False,
    as_json: Json = False,
) -> None:
    """Merge adapters into one ordinary PEFT folder, which vLLM, PEFT and transformers load.

    Paths in a recipe start at the recipe's own folder. OUT appears whole or not at all;
    `recipe.lock.json` in it says what it was made of and what each layer kept.

    Exit code 0: written. 1: refused; the message begins with a code of docs/errors.md. 2: wrong
    usage.

    Examples:

    `vllm-lora-ext merge mix.yaml --out adapters/mix`

    `vllm-lora-ext merge --method ties --set density=0.3 --rank 16 --adapter math=adapters/math:0.6
    --adapter code=adapters/code --out adapters/both`
    """
    if listing:
        _list(as_json)
        return
    if out is None:
        raise typer.BadParameter("say where to write", param_hint="--out")
    plain = {
        "--method": method, "--adapter": adapters, "--rank": rank, "--set": sets,
        "--base-model": base_model,
    }  # fmt: skip
    given = [option for option, value in plain.items() if value]
    if recipe is not None and given:
        raise typer.BadParameter("a recipe says this itself", param_hint=given[0])
    if recipe is None and not (method and adapters):
        raise typer.BadParameter("name a recipe, or --method and --adapter", param_hint="RECIPE")
    from vllm_lora_ext.adapters.output import check_place

    try:
        check_place(out)  # before minutes of merging
        if recipe is not None:
            found, folder = _read(recipe), recipe.parent
        else:
            found = _written(str(method), adapters or [], rank, sets, base_model)
            folder = Path()
        built = _build(found, folder, out, dtype)
    except AdapterError as error:
        fail(error, as_json)
    if as_json:
        print_json({"ok": True, "out": str(built.path), "rank": built.rank, "report": built.report})
    else:
        _report(built)


def _read(path: Path) -> Any:
    from vllm_lora_ext.merging.recipes import read_recipe

    return read_recipe(path)


def _written(
    method: str, adapters: list[str], rank: int | None, sets: list[str] | None, base: str | None
) -> Any:
    """The recipe that plain arguments mean."""
    from vllm_lora_ext.merging.recipes import parse_recipe

    models = []
    for name, text in named_values(adapters, "--adapter").items():
        folder, weight = _weighted(text)
        models.append({"model": folder, "name": name, "parameters": {"weight": weight}})
    found: dict[str, Any] = {
        "version": 1, "merge_method": method, "models": models, "parameters": parse_settings(sets),
    }  # fmt: skip
    if rank is not None:
        found["output"] = {"rank": rank}
    if base is not None:
        found["base_model"] = base
    return parse_recipe(found)


def _weighted(text: str) -> tuple[str, float]:
    """`DIR:0.6`; a colon that no number follows belongs to the folder."""
    folder, colon, weight = text.rpartition(":")
    try:
        return (folder, float(weight)) if colon and folder else (text, 1.0)
    except ValueError:
        return text, 1.0


def _build(recipe: Any, folder: Path, out: Path, dtype: Dtype | None) -> Any:
    import torch

    from vllm_lora_ext.merging.recipes import write_recipe

    with _bar() as progress:
        return write_recipe(
            recipe, lambda name: folder / Path(name).expanduser(), out, progress=progress,
            dtype=None if dtype is None else getattr(torch, dtype.value),
        )  # fmt: skip


@contextmanager
def _bar() -> Iterator[Callable[[int, int, str], None]]:
    """Modules that are done, on a terminal's stderr."""
    console = Console(stderr=True)
    columns = (BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=None)

        def show(done: int, every: int, name: str) -> None:
            progress.update(task, completed=done, total=every, description=escape(name))

        yield show


def _report(built: Any) -> None:
    from vllm_lora_ext.adapters.limits import slot_rank

    show = Console()

    def line(text: str) -> None:
        show.print(text, highlight=False, soft_wrap=True)

    report = built.report
    modules = report["modules"]
    line(f"{escape(str(built.path))}: {len(modules)} layers, rank {built.rank}")
    line(("exact" if report["exact"] else "not exact") + f": {escape(report['why'])}")
    lost = {name: m for name, m in modules.items() if m["kept_energy"] < 1 - 1e-6}
    if lost:
        made = table("layer", "rank", "energy kept")
        worst = sorted(lost.items(), key=lambda item: item[1]["kept_energy"])
        for name, module in worst[:10]:
            made.add_row(escape(name), str(module["rank"]), f"{module['kept_energy']:.2%}")
        show.print(made)
        if len(worst) > 10:
            line(f"and {len(worst) - 10} more layers; recipe.lock.json has them all")
    for warning in report["warnings"]:
        line(f"[yellow]note[/]: {escape(warning)}")
    line(f"serve it with:\n  --enable-lora --max-lora-rank {slot_rank(built.rank) or built.rank}"
         f" --lora-modules NAME={escape(str(built.path))}")  # fmt: skip


def _list(as_json: bool) -> None:
    from vllm_lora_ext.merging import all_methods

    rows: list[dict[str, Any]] = [
        {
            "name": m.name, "what": m.title, "exact": m.exact, "paper": m.url,
            "parameters": {key: value for key, value in m.parameters.items() if value is not None},
        }
        for m in all_methods().values()
    ]  # fmt: skip
    if as_json:
        print_json(rows)
        return
    made = table("method", "exact", "what", "paper")
    for row in rows:
        made.add_row(row["name"], "yes" if row["exact"] else "", escape(row["what"]), row["paper"])
    Console().print(made)
