"""``peanut generate``: generates text with a trained adapter."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..training.terminal import quiet

__all__ = ["generate"]


def generate(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder, or the run's.", show_default=False)],
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts; the lines of standard input if none.", show_default=False)
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="Folder or hub id of the base model, if it moved.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; more is more varied.", min=0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the random choices.", min=0)] = 0,
    merge: Annotated[
        bool, typer.Option(help="Merge the adapter into the weights first: faster for long answers.")
    ] = True,
) -> None:
    """Answer prompts with a trained language model, printing tokens as they come."""
    quiet()
    from ..training.generation import Generator

    generator = Generator(adapter, base_model=base_model, merge=merge, seed=seed)
    given = prompts or (line.rstrip("\n") for line in sys.stdin)
    for index, prompt in enumerate(given):
        if index:
            print()
        if prompts is None or len(prompts) > 1:
            print(f"> {prompt}")
        generator.stream(prompt, max_new_tokens=max_new_tokens, temperature=temperature)
