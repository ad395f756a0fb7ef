"""``peanut eval``: evaluates a trained adapter on data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..training.terminal import quiet
from .flags import parse_flags

__all__ = ["evaluate"]


def evaluate(
    context: typer.Context,
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder, or the run's.", show_default=False)],
    data: Annotated[str | None, typer.Option(help="Rows to evaluate on; the run's own if not given.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Folder or hub id of the base model, if it moved.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many rows, drawn at random.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Rows a step.", min=1)] = 32,
) -> None:
    """Print the task's metrics of a trained adapter.

    Columns that are called otherwise than in training: --data.text review --data.label stars.
    """
    from ..errors import PeanutError, nearest

    flags, others = parse_flags(context.args)
    for key in [*flags, *others]:
        if not key.startswith("data."):
            known = ["data", "base-model", "limit", "batch-size", "data.text", "data.label"]
            raise PeanutError(
                f"unknown argument {key!r}", "a flag of peanut eval", f"nearest: {nearest(key, known, 2)}"
            )
    quiet()
    from rich.console import Console
    from rich.table import Table

    from ..training.evaluation import evaluate as run

    columns = {key.removeprefix("data."): value for key, value in flags.items()}
    metrics = run(adapter, data, base_model=base_model, limit=limit, batch_size=batch_size, columns=columns)
    table = Table(show_header=False, box=None)
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}")
    Console().print(table)
