"""``peanut export``."""

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
) -> None:
    """Write the adapter as plain LoRA of the same rank, which every server of LoRA reads."""
    from ..files import check_new, write_folder

    check_new(output)
    quiet()
    from ..export import to_lora
    from ..training.model import load_trained, save_task

    trained = load_trained(adapter, base_model)
    exported = to_lora(trained.model)

    def write(folder: Path) -> None:
        exported.save(folder)
        save_task(folder, trained.task, trained.processor)

    write_folder(output, write)
    print(f"{to.value} adapter: {output} (largest relative error of an update: {exported.largest_error:.1e})")
