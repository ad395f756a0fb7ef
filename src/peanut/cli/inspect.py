"""``peanut inspect``: per layer, the size and the rank of an adapter's update."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..training.terminal import quiet

__all__ = ["inspect"]


def inspect(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder, or the run's.", show_default=False)],
    base_model: Annotated[str | None, typer.Option(help="Folder or hub id of the base model, if it moved.")] = None,
) -> None:
    """Print an adapter's config and, layer by layer, how large its update is and of what rank.

    Of an adapter that changes no weight, its tensors.
    """
    quiet()
    from rich.console import Console
    from rich.table import Column, Table

    from ..model.inspection import inspect_adapter, inspect_places
    from ..training.model import load_trained

    trained = load_trained(adapter, base_model)
    config = Table(title="Config", title_justify="left", show_header=False, box=None)
    for key, value in trained.model.peft_config["default"].to_dict().items():
        if value is not None:
            config.add_row(key, str(value))
    numbers = ("out × in", "parameters", "‖ΔW‖", "‖ΔW‖ / ‖W‖", "effective rank")
    layers = Table(Column("layer", overflow="fold"), *(Column(name, justify="right") for name in numbers), box=None)
    for report in inspect_adapter(trained.model):
        layers.add_row(
            report.path,
            f"{report.shape[0]} × {report.shape[1]}",
            f"{report.parameters:,}",
            f"{report.delta_norm:.3g}",
            f"{report.relative_norm:.2%}",
            f"{report.effective_rank:.1f}",
        )
    places = Table(Column("place", overflow="fold"), "tensor", Column("shape", justify="right"), "norm", box=None)
    for place in inspect_places(trained.model):
        for suffix, (shape, norm) in place.tensors.items():
            places.add_row(place.path, suffix, " × ".join(map(str, shape)), f"{norm:.3g}")
    console = Console(soft_wrap=True)
    console.print(config)
    for table in (layers, places):
        if table.row_count:
            console.print()
            console.print(table)
