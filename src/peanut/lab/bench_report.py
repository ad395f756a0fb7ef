"""What the benchmark found, told: tables on the terminal, a JSON file and a plot."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__
from ..files import write_files
from ..protocols import FORMAT_VERSION
from .measure import Spread, processor, ratio
from .variants import By, Settings, peer_version

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Row", "print_tables", "report", "write_report"]


@dataclass
class Row:
    """What was found of one variant.

    Args:
        method: as tables name it; empty for the frozen stack.
        by: whose implementation it is.
        trained_parameters: how many.
        saved_bytes: what a forward keeps for the backward, as ``measure.saved_bytes`` counts it.
        peak_bytes: the most memory of a training step, as ``measure.peak_bytes`` counts it.
        difference: of a peer's output from this library's, relative to the largest entry.
        seconds: of ``forward``, ``backward`` and the whole training ``step``, and of one ``token`` in evaluation; one
            value a round.
    """

    method: str
    by: By
    trained_parameters: int
    saved_bytes: int
    peak_bytes: int
    difference: float | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The row's name in tables."""
        return f"{self.method} {self.by}" if self.method else self.by

    def to(self, other: Row) -> dict[str, Any]:
        """Ratios to another row: a spread for each time, a number for bytes, ``None`` where the other has none."""
        ratios: dict[str, Any] = {name: asdict(ratio(own, other.seconds[name])) for name, own in self.seconds.items()}
        for name in ("saved_bytes", "peak_bytes"):
            ratios[name] = getattr(self, name) / getattr(other, name) if getattr(other, name) else None
        return ratios


def references(row: Row, rows: Sequence[Row]) -> dict[str, Row]:
    """What a row is compared with, as far as it is there: the frozen stack, the peer's same method, the peer's LoRA."""
    wanted = {"frozen": ("", "frozen"), "peer": (row.method, "peft"), "peer_lora": ("LORA", "peft")}
    known = {(each.method, each.by): each for each in rows if each is not row}
    return {name: known[key] for name, key in wanted.items() if key in known and row.method}


def report(rows: Sequence[Row], settings: Settings) -> dict[str, Any]:
    """The content of the JSON file: versions, hardware, settings, and each variant's figures and ratios."""
    variants = [
        {name: value for name, value in asdict(row).items() if name != "seconds"}
        | {"seconds": {name: asdict(Spread.of(values)) for name, values in row.seconds.items()}}
        | {"ratios": {name: row.to(other) for name, other in references(row, rows).items()}}
        for row in rows
    ]
    return {
        "versions": {"peanut": __version__, "torch": str(torch.__version__), "peft": peer_version()},
        "hardware": processor(torch.device(settings.device)),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "settings": asdict(settings),
        "variants": variants,
    }


def write_report(folder: Path, rows: Sequence[Row], settings: Settings) -> list[Path]:
    """Writes JSON and plot and returns where they are, named by version, hardware and what is not the default."""
    changed = "".join(f"-{name}-{value}" for name, value in settings.changed.items() if name != "device")
    name = _plain(f"bench-{__version__}-{processor(torch.device(settings.device))}-{settings.threads}t{changed}")
    text = json.dumps(report(rows, settings), indent=2, sort_keys=True) + "\n"
    write_files(
        folder,
        {
            f"{name}.json": lambda path: path.write_text(text, encoding="utf-8"),
            f"{name}.png": lambda path: plot(path, rows, settings),
        },
    )
    return [folder / f"{name}.json", folder / f"{name}.png"]


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def print_tables(rows: Sequence[Row]) -> None:
    """Prints what a training step takes, what it holds in memory, and what one token takes."""
    from rich.console import Console

    memory: list[tuple[str, Column]] = [
        ("trained", lambda row, _: f"{row.trained_parameters:,}"),
        ("kept MiB", lambda row, _: f"{row.saved_bytes / 2**20:,.2f}"),
        ("÷ peft", lambda _, ratios: _bytes(ratios, "peer", "saved_bytes")),
        ("peak MiB", lambda row, _: f"{row.peak_bytes / 2**20:,.2f}"),
        ("÷ frozen", lambda _, ratios: _bytes(ratios, "frozen", "peak_bytes")),
        ("÷ peft", lambda _, ratios: _bytes(ratios, "peer", "peak_bytes")),
    ]
    console = Console()
    console.print(_table("Time of a training step", _times("step"), rows))
    console.print(_table("Memory of a training step: kept for the backward, and the peak", memory, rows))
    console.print(_table("Time of one token in evaluation", _times("token"), rows))
    console.print(
        "÷ LORA: to the peer's LoRA. ± half the distance between the quartiles of the rounds' ratios.\n"
        "least: the ratio of the least times, those that other work on the machine disturbed least.\n"
        "kept: beyond the parameters and the input of every layer. peak: beyond weights, optimiser state and input."
    )
    differences = [row.difference for row in rows if row.difference is not None]
    if differences:
        console.print(f"Outputs of the two sides differ by at most {max(differences):.1e} of the largest entry.")
    if peer_version() is None:
        console.print(
            "Hugging Face PEFT is not installed, so nothing is compared with it: "
            f"pip install peft=={FORMAT_VERSION} and run this again."
        )


Column = Callable[[Row, dict[str, dict[str, Any]]], str]
"""A column's cell, from a row and its ratios."""


def _times(quantity: str) -> list[tuple[str, Column]]:
    """Columns for a time: milliseconds, and to each reference the median of ratios and the ratio of the least times."""

    def milliseconds(row: Row, _: object) -> str:
        median = 1000 * Spread.of(row.seconds[quantity]).median
        return f"{median:,.0f}" if median >= 100 else f"{median:.3g}"

    def median(reference: str) -> Column:
        return lambda _, ratios: _spread(ratios, reference, quantity)

    def least(reference: str) -> Column:
        return lambda _, ratios: f"{ratios[reference][quantity]['least']:.2f}" if reference in ratios else ""

    columns: list[tuple[str, Column]] = [("ms", milliseconds)]
    for header, reference in (("÷ frozen", "frozen"), ("÷ peft", "peer"), ("÷ LORA", "peer_lora")):
        columns += [(header, median(reference)), ("least", least(reference))]
    return columns


def _spread(ratios: dict[str, dict[str, Any]], reference: str, quantity: str) -> str:
    if reference not in ratios:
        return ""
    value = ratios[reference][quantity]
    return f"{value['median']:.2f}±{(value['high'] - value['low']) / 2:.2f}"


def _bytes(ratios: dict[str, dict[str, Any]], reference: str, quantity: str) -> str:
    value = ratios.get(reference, {}).get(quantity)
    return "" if value is None else f"{value:.3f}"


def _table(title: str, columns: Sequence[tuple[str, Column]], rows: Sequence[Row]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    table.add_column("")
    ratios = [{name: row.to(other) for name, other in references(row, rows).items()} for row in rows]
    filled = []
    for header, cell in columns:
        cells = [cell(row, own) for row, own in zip(rows, ratios, strict=True)]
        if any(cells):  # without the peer there is nothing to compare with it
            table.add_column(header, justify="right")
            filled.append(cells)
    for row, *cells in zip(rows, *filled, strict=True):
        table.add_row(row.name, *cells)
    return table


def plot(path: Path, rows: Sequence[Row], settings: Settings) -> None:
    """Draws each variant's training step, what it keeps for the backward, and its token, as a PNG."""
    from matplotlib.figure import Figure

    frozen, adapted = rows[0], rows[1:]
    names = [row.name for row in adapted]
    colours = ["tab:orange" if row.by == "peanut" else "silver" for row in adapted]
    figure = Figure(figsize=(13, 2 + 0.45 * len(adapted)), layout="constrained")
    step, kept, token = figure.subplots(1, 3, sharey=True)
    for axes, name, title in ((step, "step", "one training step"), (token, "token", "one token in evaluation")):
        ratios = [ratio(row.seconds[name], frozen.seconds[name]) for row in adapted]
        medians = [each.median for each in ratios]
        quartiles = [[each.median - each.low for each in ratios], [each.high - each.median for each in ratios]]
        axes.barh(names, medians, xerr=quartiles, color=colours, capsize=3)
        axes.plot([each.least for each in ratios], names, "d", color="black", markersize=5)
        for place, each in enumerate(ratios):
            axes.text(max(each.high, each.least), place, f"   {each.median:.2f}", verticalalignment="center")
        axes.axvline(1, color="black", linewidth=1)
        axes.set(title=title, xlabel="time, relative to the frozen stack")
        axes.margins(x=0.2)
    mebibytes = [row.saved_bytes / 2**20 for row in adapted]
    kept.bar_label(kept.barh(names, mebibytes, color=colours), [f"{size:.2f}" for size in mebibytes], padding=3)
    kept.set(title="kept for the backward", xlabel="MiB beyond parameters and layers' inputs")
    kept.margins(x=0.2)
    step.invert_yaxis()
    narrow, wide = settings.dims
    shape = f"{narrow}→{wide}→{narrow}" if settings.stack == "layers" else f"Llama blocks {narrow}/{wide}"
    figure.suptitle(
        f"{settings.blocks} × {shape}, {settings.tokens:,} tokens, rank {settings.rank}, "
        f"{settings.dtype}, {processor(torch.device(settings.device))}, threads: {settings.threads}"
    )
    figure.supxlabel("bar: median, line: quartiles, diamond: ratio of the least times", fontsize="small")
    figure.savefig(path, format="png", dpi=120)
