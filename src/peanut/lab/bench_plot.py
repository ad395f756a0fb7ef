"""The benchmark's plot: training step, evaluation and memory of each method, here and in Hugging Face PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .bench_rows import Row
from .measure import Spread, processor, ratio
from .settings import STACKS, Settings

__all__ = ["plot"]

COLOURS = {"peanut": "tab:orange", "peft": "silver"}
_TITLES = {"token": "one token in evaluation", "generate": "one generated token", "answer": "one row's answer"}


def plot(path: Path, rows: Sequence[Row], settings: Settings) -> None:
    """Draws each method's training step, what it keeps for the backward, and its evaluation, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    frozen, adapted = rows[0], rows[1:]
    methods = list(dict.fromkeys(row.method for row in adapted))
    figure = Figure(figsize=(13, 2 + 0.42 * len(methods)), layout="constrained")
    step, kept, inference = figure.subplots(1, 3, sharey=True)
    places = [methods.index(row.method) + (0.2 if row.by == "peft" else -0.2) for row in adapted]
    colours = [COLOURS[row.by] for row in adapted]
    quantity = STACKS[settings.stack].inference
    for axes, name, title in ((step, "step", "one training step"), (inference, quantity, _TITLES[quantity])):
        ratios = [ratio(row.seconds[name], frozen.seconds[name]) for row in adapted]
        _bars(axes, places, ratios, colours)
        axes.set(title=title, xlabel="time, relative to the frozen one")
    sizes = [row.saved_bytes / 2**20 for row in adapted]
    kept.barh(places, sizes, 0.4, color=colours)
    for place, size in zip(places, sizes, strict=True):
        kept.text(max(size, 0), place, f" {size:.3g}", verticalalignment="center", fontsize="x-small")
    kept.set_xscale("symlog", linthresh=0.1)
    kept.set(title="kept for the backward", xlabel="MiB beyond parameters and layers' inputs")
    kept.margins(x=0.25)
    step.set_yticks(range(len(methods)), methods)
    step.invert_yaxis()
    step.margins(y=0.01)
    figure.legend(handles=[Patch(color=colour, label=by) for by, colour in COLOURS.items()], loc="upper left")
    sizes_told = f"{settings.blocks} × {'→'.join(map(str, [*settings.dims, settings.dims[0]]))}"
    figure.suptitle(
        f"{settings.stack}: {sizes_told}, {settings.tokens:,} tokens, rank {settings.rank}, {settings.dtype}\n"
        f"{processor(torch.device(settings.device))}, threads: {settings.threads}"
    )
    figure.supxlabel("bar: median, line: quartiles, diamond: ratio of the least times", fontsize="small")
    figure.savefig(path, format="png", dpi=120)


def _bars(axes: Any, places: Sequence[float], ratios: Sequence[Spread], colours: Sequence[str]) -> None:
    """Bars of ratios on a logarithmic axis, each with its figure at the end."""
    medians = [each.median for each in ratios]
    quartiles = [[each.median - each.low for each in ratios], [each.high - each.median for each in ratios]]
    axes.barh(places, medians, 0.4, xerr=quartiles, color=colours, error_kw={"elinewidth": 0.8})
    axes.plot([each.least for each in ratios], places, "d", color="black", markersize=3)
    axes.set_xscale("log")
    for place, each in zip(places, ratios, strict=True):
        end = max(each.high, each.least)
        axes.text(end, place, f"  {each.median:.2f}", verticalalignment="center", fontsize="x-small")
    axes.axvline(1, color="black", linewidth=1)
    least, most = min(each.least for each in ratios), max(each.high for each in ratios)
    axes.set_xlim(min(0.8, 0.9 * least), 1.6 * most)
