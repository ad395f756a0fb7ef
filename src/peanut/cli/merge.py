"""``peanut merge``: writes a model with the adapter merged into its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..training.terminal import quiet

__all__ = ["merge"]


def merge(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder, or the run's.", show_default=False)],
    output: Annotated[Path, typer.Option(help="The model's new folder.", show_default=False)],
    base_model: Annotated[str | None, typer.Option(help="Folder or hub id of the base model, if it moved.")] = None,
) -> None:
    """Write the base model with the adapter merged into its weights, as a folder that loads without this library."""
    from ..files import check_new

    check_new(output)
    quiet()
    from ..export import save_merged
    from ..training.model import load_trained

    trained = load_trained(adapter, base_model)
    save_merged(trained.model, output, trained.processor)
    print(f"merged model: {output}")
