"""Reads data: CSV, TSV, JSON lines, JSON, Parquet, plain text, image folders, or a dataset of the hub."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from ..errors import PeanutError, nearest

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["IMAGE_TYPES", "check_column", "draw", "read_rows"]

IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<split>[\w.\[\]%:+-]+))?")


def read_rows(source: str, *, text_columns: Iterable[str] = (), subset: str | None = None) -> Dataset:
    """The rows that ``source`` holds.

    Args:
        source: a file, an image folder with one folder a class, or a hub dataset ``owner/name`` or ``owner/name:split``
            (a path that exists always wins, and what ends like a data file is never looked up).
        text_columns: columns of a CSV file that are text even where they look like numbers.
        subset: configuration of a hub dataset.

    Raises:
        PeanutError: it is not there, of an unknown type, unreadable or empty.
    """
    import datasets

    path = Path(source)
    if path.is_dir():
        rows = _read_image_folder(path)
    elif path.exists() or path.suffix.lower() in _READERS:
        table = _read_file(path, tuple(text_columns))
        twice = sorted(name for name, count in Counter(table.column_names).items() if count > 1)
        if twice:
            raise PeanutError(f"'{path}' has the column {twice[0]!r} twice", "each name once", "rename or remove one")
        try:
            rows = datasets.Dataset(table)
        except RecursionError:
            raise PeanutError(f"a value in '{path}' is nested too deeply", "lists and objects", "correct it") from None
    else:
        rows = _read_hub(source, subset)
    if len(rows) == 0:
        raise PeanutError(f"'{source}' has no rows", "at least one row", "check the file")
    return rows


def check_column(rows: Dataset, name: str, key: str, source: str, kind: str | None = None) -> None:
    """Checks that a column exists and has a value in every row.

    Args:
        rows: the data.
        name: the column.
        key: the config key that names it, for the error.
        source: where the rows come from, for the error.
        kind: ``"text"`` if it must hold text.

    Raises:
        PeanutError: it is missing, has gaps, or is not of that kind.
    """
    found = rows.column_names
    if name not in found:
        raise PeanutError(
            f"'{source}' has no column {name!r} (it has {', '.join(map(repr, found))})",
            f"the column that {key} names",
            f"set {key} (nearest: {nearest(name, found, 1)})",
        )
    column = rows.data.column(name)
    if column.null_count:
        row = pc.index(pc.is_null(column), True).as_py() + 1
        raise PeanutError(f"row {row} of '{source}' has no {name!r}", "a value in every row", "fill or remove the row")
    if kind == "text" and not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise PeanutError(
            f"column {name!r} of '{source}' holds {column.type}", "text", f"set {key} to a column of text"
        )


def draw(rows: Dataset, limit: int | None, seed: int) -> Dataset:
    """At most ``limit`` rows, drawn at random: files are often sorted by label."""
    if limit is None or len(rows) <= limit:
        return rows
    return rows.shuffle(seed=seed).select(range(limit))


def _read_file(path: Path, text_columns: tuple[str, ...]) -> pa.Table:
    if not path.is_file():
        raise PeanutError(f"no file '{path}'", "a data file", "check the path")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise PeanutError(
            f"'{path}' is of an unknown type {path.suffix!r}", f"one of {', '.join(_READERS)}", "convert or rename it"
        )
    if path.stat().st_size == 0:
        raise PeanutError(f"'{path}' is empty", "at least one row", "check the file")
    try:
        return reader(path, text_columns)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise PeanutError(f"cannot read '{path}': {reason}", f"a whole {path.suffix} file", "correct it") from None


def _read_csv(path: Path, text_columns: tuple[str, ...]) -> pa.Table:
    from pyarrow import csv

    # One block for the whole file: types are inferred from the first one alone.
    return csv.read_csv(
        path,
        read_options=csv.ReadOptions(block_size=min(path.stat().st_size + 1, 2**31 - 1)),
        parse_options=csv.ParseOptions(
            newlines_in_values=True, delimiter="\t" if path.suffix.lower() == ".tsv" else ","
        ),
        convert_options=csv.ConvertOptions(column_types={name: pa.string() for name in text_columns}),
    )


def _read_json(path: Path, _: tuple[str, ...]) -> pa.Table:
    text = path.read_text(encoding="utf-8-sig")
    numbered: list[tuple[int, Any]] = []
    if text.lstrip().startswith("["):
        try:
            numbered = list(enumerate(json.loads(text), start=1))
        except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
            raise PeanutError(f"'{path}' is not JSON: {error}", "a list of objects", "correct it") from None
    else:
        # Not splitlines: JSON may hold U+2028 and its like, which that takes for ends of lines.
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                numbered.append((number, json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise PeanutError(
                    f"line {number} of '{path}' is not JSON: {error}", "one object a line", "correct it"
                ) from None
    for number, row in numbered:
        if not isinstance(row, dict):
            raise PeanutError(f"entry {number} of '{path}' is no object", '{"column": value, …}', "correct it")
    names = dict.fromkeys(name for _, row in numbered for name in row)
    return pa.table({name: _column([row.get(name) for _, row in numbered], name, path) for name in names})


def _column(values: list[Any], name: str, path: Path) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise PeanutError(
            f"column {name!r} of '{path}' mixes kinds of values: {next(iter(str(error).splitlines()), '')}",
            "one kind a column",
            "correct it",
        ) from None


def _read_parquet(path: Path, _: tuple[str, ...]) -> pa.Table:
    from pyarrow import parquet

    return parquet.read_table(path)


def _read_text(path: Path, _: tuple[str, ...]) -> pa.Table:
    return pa.table({"text": [path.read_text(encoding="utf-8-sig")]})


_READERS: dict[str, Callable[[Path, tuple[str, ...]], pa.Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}


def _read_image_folder(folder: Path) -> Dataset:
    import datasets

    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise PeanutError(f"folder '{folder}' holds no folders", "one folder of images a class", "check the path")
    paths: list[str] = []
    labels: list[int] = []
    for index, name in enumerate(classes):
        files = sorted(file for file in (folder / name).rglob("*") if file.suffix.lower() in IMAGE_TYPES)
        if not files:
            raise PeanutError(f"folder '{folder / name}' holds no images", "images of that class", "remove the folder")
        for file in files:
            _check_image(file)
        paths += map(str, files)
        labels += [index] * len(files)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
    return datasets.Dataset.from_dict({"image": paths, "label": labels}, features=features)


def _check_image(file: Path) -> None:
    from PIL import Image

    try:
        with Image.open(file):  # reads the head of the file only
            pass
    except OSError:
        raise PeanutError(f"cannot read '{file}'", "an image", "replace or remove it") from None


def _read_hub(source: str, subset: str | None) -> Dataset:
    match = _HUB_ID.fullmatch(source)
    if match is None:
        raise PeanutError(
            f"no file or folder '{source}'",
            f"a file ({', '.join(_READERS)}), an image folder, or a hub dataset owner/name",
            "check the path",
        )
    import datasets

    try:
        rows = datasets.load_dataset(match["name"], subset, split=match["split"] or "train")
    except Exception as error:  # the hub's client, its builders and the network fail in many types
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise PeanutError(
            f"no file or folder '{source}', and the hub gives no dataset of that name: {reason}", do="check the name"
        ) from None
    assert isinstance(rows, datasets.Dataset)
    return rows
