"""``peanut methods``: lists all methods."""

from __future__ import annotations

from typing import Annotated

import typer

from ..training.terminal import quiet

__all__ = ["methods"]


def methods(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a page of Markdown instead.")] = False,
) -> None:
    """List the methods: what each changes, how many parameters it trains, what can be done with it."""
    quiet()
    from rich.console import Console
    from rich.table import Column, Table

    from ..lab.catalogue import catalogue
    from ..lab.catalogue import markdown as page

    if markdown:
        print(page(), end="")
        return
    table = Table("peft_type", Column("method", ratio=2), Column("parameters in a layer", ratio=1), "as LoRA", "layers")
    for entry in catalogue():
        table.add_row(
            entry.name,
            entry.title,
            entry.parameters.replace("\\", ""),
            "exact" if entry.exact_as_lora else "",
            ", ".join(entry.kinds) or "whole modules",
        )
    Console().print(table)
