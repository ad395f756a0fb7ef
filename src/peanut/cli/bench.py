"""``peanut bench``: measures speed and memory of methods."""

from __future__ import annotations

import typer

__all__ = ["bench"]


def bench(context: typer.Context) -> None:
    """Measure methods side by side: speed, memory, bytes kept for the backward (see peanut bench --help)."""
    from ..lab.bench import main

    raise typer.Exit(main(context.args))
