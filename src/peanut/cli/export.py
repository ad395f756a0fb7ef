"""``peanut export``: writes an adapter as LoRA."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..training.terminal import quiet

__all__ = ["export"]


class Form(str, Enum):
    """What an adapter can be written as."""

    LORA = "lora"


def export(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder, or the run's.", show_default=False)],
    to: Annotated[Form, typer.Option(help="The form to write.", show_default=False)],
    output: Annotated[Path, typer.Option(help="The new adapter's folder.", show_default=False)],
    base_model: Annotated[str | None, typer.Option(help="Folder or hub id of the base model, if it moved.")] = None,
    rank: Annotated[int | None, typer.Option(help="The largest rank; by default the adapter's own, or 16.")] = None,
) -> None:
    """Write the adapter as plain LoRA, which every server of LoRA reads: exactly, or the best of a rank."""
    from ..files import check_new, write_folder

    check_new(output)
    quiet()
    from ..export import to_lora
    from ..training.model import load_trained, save_task

    trained = load_trained(adapter, base_model)
    exported = to_lora(trained.model, rank=rank)

    def write(folder: Path) -> None:
        exported.save(folder)
        save_task(folder, trained.task, trained.processor)

    write_folder(output, write)
    print(f"{to.value} adapter: {output} (largest relative error of an update: {exported.largest_error:.1e})")
