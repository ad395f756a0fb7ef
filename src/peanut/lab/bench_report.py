"""Prints the benchmark's results as tables and writes them as JSON with a plot."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__
from ..files import write_files
from ..protocols import FORMAT_VERSION
from .bench_plot import plot
from .bench_rows import BYTES, Row, references
from .measure import Spread, geometric_mean, processor
from .settings import STACKS, Settings
from .variants import peer_version

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["print_tables", "report", "summary", "write_report"]


def summary(rows: Sequence[Row]) -> dict[str, Any] | None:
    """How this library compares with PEFT over all contestants that both have; ``None`` if there is none."""
    theirs = {row.method: row for row in rows if row.by == "peft"}
    pairs = {row.method: row.to(theirs[row.method]) for row in rows if row.by == "peanut" and row.method in theirs}
    if not pairs:
        return None
    quantities = list(dict.fromkeys(name for ratios in pairs.values() for name in ratios))
    means, worse = {}, []
    for name in quantities:
        found = {method: ratios[name] for method, ratios in pairs.items() if ratios.get(name) is not None}
        spreads = {
            method: dict.fromkeys(("median", "low", "high", "least"), value) if name in BYTES else value
            for method, value in found.items()
        }
        positive = [1 / each["median"] for each in spreads.values() if each["median"] > 0]
        means[name] = geometric_mean(positive) if positive else None
        worse += [
            {"method": method, "quantity": name, "ratio": each, "clear": each["low"] > 1}
            for method, each in spreads.items()
            if name not in ("forward", "backward") and each["median"] > (1.005 if name in BYTES else 1)
        ]
    return {
        "compared": len(pairs),
        "speed_up": {name: mean for name, mean in means.items() if name not in BYTES},
        "bytes": {name: mean for name, mean in means.items() if name in BYTES},
        "worse": worse,
    }


def report(rows: Sequence[Row], settings: Settings) -> dict[str, Any]:
    """The content of the JSON file, told in ``lab/bench.py``."""
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
        "summary": summary(rows),
    }


def write_report(folder: Path, rows: Sequence[Row], settings: Settings) -> list[Path]:
    """Writes JSON and plot and returns where they are, named by version, hardware and what is not the default."""
    changed = "".join(f"-{name}-{value}" for name, value in settings.changed.items())
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


def print_tables(rows: Sequence[Row], settings: Settings) -> None:
    """Prints what a training step takes and holds, what evaluation takes, what files take, and how both sides stand."""
    from rich.console import Console

    inference = STACKS[settings.stack].inference
    told = {
        "token": "Time of one token in evaluation",
        "generate": "Time of a generated token, with a cache",
        "answer": "Time of one row's answer in evaluation",
    }[inference]
    memory = [("trained", lambda row, _: f"{row.trained_parameters:,}")]
    for header, name in (("kept", "saved_bytes"), ("peak", "peak_bytes"), ("eval", "evaluation_bytes")):
        memory += _mebibytes(header, name)
    files = _mebibytes("file", "file_bytes")
    for name in ("inject", "save", "load"):
        files += [(name, _milliseconds(name)), ("÷ peft", _median("peer", name))]
    console = Console()
    console.print(_table("Time of a training step, ms", _times("step"), rows))
    console.print(_table("Memory of a training step and of evaluation, MiB", memory, rows))
    console.print(_table(f"{told}, ms", _times(inference), rows))
    console.print(_table("Adapter file, MiB; injection, saving and loading, ms", files, rows[1:]))
    console.print(
        "÷ LORA: to Hugging Face PEFT's LoRA. ± half the distance between the quartiles of the rounds' ratios.\n"
        "least: the ratio of the least times, those that other work on the machine disturbed least.\n"
        "kept for the backward: beyond parameters, layers' inputs and what the frozen model keeps.\n"
        "peak of a step: beyond weights, optimiser state and input. eval: the first forward and what it computes once."
    )
    for line in _lines(rows):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _lines(rows: Sequence[Row]) -> list[str]:
    """What is said in words under the tables."""
    lines = [f"{row.name}: {row.note}" for row in rows if row.note]
    differences = [row.difference for row in rows if row.difference is not None]
    if differences:
        lines.append(f"Outputs of the two sides differ by at most {max(differences):.1e} of the largest entry.")
    if peer_version() is None:
        lines.append(
            "Hugging Face PEFT is not installed, so nothing is compared with it: "
            f"pip install peft=={FORMAT_VERSION} and run this again."
        )
    found = summary(rows)
    if found is None:
        return lines
    means = [f"{name} {value:.2f}" for name, value in found["speed_up"].items() if value]
    lines.append(f"Times of Hugging Face PEFT ÷ ours, geometric mean of {found['compared']}: {', '.join(means)}.")
    means = [f"{name.removesuffix('_bytes')} {value:.2f}" for name, value in found["bytes"].items() if value]
    lines.append(f"Bytes of Hugging Face PEFT ÷ ours, geometric mean of {found['compared']}: {', '.join(means)}.")
    worse = found["worse"]
    methods = dict.fromkeys(each["method"] for each in worse)
    lines += [f"more than Hugging Face PEFT's, {method}: {'; '.join(_worse(worse, method))}" for method in methods]
    if not worse:
        lines.append("Nothing is slower or hungrier than Hugging Face PEFT's.")
    return lines


def _worse(worse: Sequence[dict[str, Any]], method: str) -> Iterator[str]:
    """In what one method takes more than Hugging Face PEFT's, and how sure that is."""
    for each in worse:
        quantity, value = each["quantity"], each["ratio"]
        if each["method"] == method and quantity in BYTES:
            yield f"{quantity.removesuffix('_bytes')} {value['median']:.2f}"
        elif each["method"] == method:
            clear = "" if each["clear"] else "?"
            yield f"{quantity}{clear} {value['median']:.2f} ({value['low']:.2f} to {value['high']:.2f})"


Column = tuple[str, Callable[[Row, dict[str, dict[str, Any]]], str]]
"""A header, and what makes a cell from a row and its ratios."""


def _times(quantity: str) -> list[Column]:
    """Columns for a time: milliseconds, and to each reference the median of ratios and the ratio of the least times."""

    def least(reference: str) -> Callable[[Row, dict[str, dict[str, Any]]], str]:
        return lambda _, ratios: f"{ratios[reference][quantity]['least']:.2f}" if reference in ratios else ""

    columns: list[Column] = [("ms", _milliseconds(quantity))]
    for header, reference in (("÷ frozen", "frozen"), ("÷ peft", "peer"), ("÷ LORA", "peer_lora")):
        columns += [(header, _median(reference, quantity)), ("least", least(reference))]
    return columns


def _milliseconds(quantity: str) -> Callable[[Row, object], str]:
    def cell(row: Row, _: object) -> str:
        if quantity not in row.seconds:
            return ""
        median = 1000 * Spread.of(row.seconds[quantity]).median
        return f"{median:,.0f}" if median >= 100 else f"{median:.3g}"

    return cell


def _median(reference: str, quantity: str) -> Callable[[Row, dict[str, dict[str, Any]]], str]:
    def cell(_: Row, ratios: dict[str, dict[str, Any]]) -> str:
        value = ratios.get(reference, {}).get(quantity)
        return "" if value is None else f"{value['median']:.2f}±{(value['high'] - value['low']) / 2:.2f}"

    return cell


def _mebibytes(header: str, name: str) -> list[Column]:
    """Columns for bytes: MiB, and to Hugging Face PEFT's."""

    def size(row: Row, _: object) -> str:
        value = getattr(row, name)
        return "" if value is None else f"{value / 2**20:,.3f}" if value < 2**20 else f"{value / 2**20:,.1f}"

    def to_peer(_: Row, ratios: dict[str, dict[str, Any]]) -> str:
        value = ratios.get("peer", {}).get(name)
        return "" if value is None else f"{value:.3f}"

    return [(header, size), ("÷ peft", to_peer)]


def _table(title: str, columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    table.add_column("")
    ratios = [{name: row.to(other) for name, other in references(row, rows).items()} for row in rows]
    filled = []
    for header, cell in columns:
        cells = [cell(row, own) for row, own in zip(rows, ratios, strict=True)]
        if any(cells):  # without Hugging Face PEFT there is nothing to compare with it
            table.add_column(header, justify="right")
            filled.append(cells)
    for row, *cells in zip(rows, *filled, strict=True):
        table.add_row(row.name, *cells)
    return table
