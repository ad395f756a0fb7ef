"""Reads a run's config: one YAML file, every key of which is also a command-line flag."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ..errors import PeanutError, nearest, shown
from .sections import DataSection, RunConfig, TaskName

__all__ = ["RunConfig", "data_section", "differing_keys", "load_config", "parse_yaml", "to_yaml"]


def load_config(
    source: str | os.PathLike[str] | Mapping[str, Any] | None = None, overrides: Mapping[str, Any] | None = None
) -> RunConfig:
    """The run that a YAML file (or a dictionary) describes, with single keys replaced.

    Args:
        source: the file; may be left out if ``overrides`` says everything.
        overrides: dotted key → value, as in ``{"training.epochs": 3}``.

    Raises:
        PeanutError: the file is missing or not YAML, a key is unknown or missing, or a value is out of range.
    """
    values: dict[str, Any] = {}
    name = "the flags"
    if isinstance(source, Mapping):
        values, name = _copy(source), "the config"
    elif source is not None:
        values, name = _read(Path(source)), f"'{source}'"
    for key, value in (overrides or {}).items():
        _put(values, key, value)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise _one_line(error.errors()[0], name) from None


def data_section(values: Mapping[str, Any], name: str) -> DataSection:
    """The data section that a file holds, less where its rows come from.

    Raises:
        PeanutError: a key is unknown, or a value is out of range.
    """
    try:
        return DataSection.model_validate({**values, "train": ""})
    except ValidationError as error:
        found = error.errors()[0]
        raise _one_line({**found, "loc": ("data", *found["loc"])}, name) from None


def to_yaml(config: RunConfig) -> str:
    """The run as YAML, every key with its value."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def parse_yaml(text: str) -> Any:
    """The value that ``text`` writes in YAML; numbers such as ``1e-3`` are numbers.

    Raises:
        PeanutError: it is not YAML.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, {})
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
    except RecursionError:
        reason = "nested too deeply"
    except (ValueError, OverflowError) as error:  # a date or a number that cannot be
        reason = next(iter(str(error).splitlines()), "")
    raise PeanutError(f"not YAML: {reason}", "key: value lines", "correct it")


def differing_keys(old: RunConfig, new: RunConfig) -> list[str]:
    """The dotted keys whose values differ between two runs."""
    left, right = dict(_flat(old.model_dump(mode="json"))), dict(_flat(new.model_dump(mode="json")))
    return [key for key in {**left, **right} if left.get(key) != right.get(key)]


class _Loader(yaml.SafeLoader):
    """YAML with YAML 1.2's numbers: PyYAML alone reads 1e-3 as a string, 010 as 8 and 1:30 as 90."""


_INT = "tag:yaml.org,2002:int"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag != _INT]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, re.compile(r"^[-+]?(0|[1-9][\d_]*|0x[\da-fA-F]+|0o[0-7]+)$"), list("-+0123456789"))

_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


_MOST = 100_000
"""The most values of a file: a few lines of aliases of aliases stand for billions."""


def _size(node: yaml.Node, sizes: dict[yaml.Node, int]) -> int:
    """How many values a node stands for, each alias counted with all that it repeats.

    Raises:
        yaml.YAMLError: too many, an alias within what it names, or a key that stands twice in a mapping.
    """
    if node in sizes:
        if not sizes[node]:
            raise yaml.YAMLError("an alias stands within what it names")
        return sizes[node]
    sizes[node] = 0
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        seen: set[tuple[str, Any]] = set()
        for key, value in node.value:
            known = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else ("", id(key))
            if known in seen:
                raise yaml.YAMLError(f"the key {key.value!r} stands twice, in line {key.start_mark.line + 1}")
            seen |= {known} if key.tag != "tag:yaml.org,2002:merge" else set()
            inner += key, value
    elif isinstance(node, yaml.SequenceNode):
        inner += node.value
    sizes[node] = 1 + sum(_size(each, sizes) for each in inner)
    if sizes[node] > _MOST:
        raise yaml.YAMLError(f"more than {_MOST:,} values")
    return sizes[node]


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise PeanutError(f"cannot read '{path}': {reason}", "a YAML file", "check the path") from None
    try:
        values = parse_yaml(text)
    except PeanutError as error:
        raise PeanutError(f"'{path}' is {error.found}", error.expected, error.do) from None
    if not isinstance(values, dict):
        raise PeanutError(
            f"'{path}' holds no keys", "sections model, task, data, adapter, training, output", "write them"
        )
    return values


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = values.get(section)
        if not isinstance(inner, dict):
            inner = values[section] = {}
        values = inner
    values[last] = value


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and (value or prefix == ""):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _one_line(error: ErrorDetails, name: str) -> PeanutError:
    """pydantic's finding as one line, with the nearest key for a mistyped one."""
    key, section = _place(error["loc"])
    expected = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    do = f"change {key}"
    if error["type"] == "extra_forbidden":
        prefix, _, last = key.rpartition(".")
        known = [f"{prefix}.{field}" if prefix else field for field in section.model_fields]
        sections = {field: _section(info.annotation) for field, info in RunConfig.model_fields.items()}
        elsewhere = [f"{field}.{last}" for field, inner in sections.items() if inner and last in inner.model_fields]
        do = f"nearest: {nearest(elsewhere[0] if elsewhere else key, elsewhere or known)}"
        return PeanutError(f"{name} has the key {key!r}", "a known key", do)
    if error["type"] == "invalid_key":
        return PeanutError(f"{name} has the key {key}", "keys of text", "correct it, or write it in quotes")
    if error["type"] == "missing":
        inner = _section(section.model_fields[key.rpartition(".")[2]].annotation)
        if inner is not None:
            key += "." + next(field for field, info in inner.model_fields.items() if info.is_required())
        return PeanutError(f"{name} has no key {key!r}", f"a value for {key}", f"add it, or give --{key} VALUE")
    if error["type"] == "model_type":
        inner = _section(section.model_fields[key.rpartition(".")[2]].annotation)
        expected = "a section with keys such as " + ", ".join(list(inner.model_fields)[:3]) if inner else expected
    elif key == "task":
        expected = "one of " + ", ".join(get_args(TaskName))
        do = f"nearest: {nearest(shown(error['input']), get_args(TaskName), 1)}"
    elif error["type"] == "int_parsing_size":
        expected = "a number of at most 18 digits"
    elif key == "output" and error["type"] == "string_pattern_mismatch":
        expected, do = "a folder's path", "name one"
    elif key == "training.eval_every":
        expected = "a whole number of at least 1, or 'epoch'"
    return PeanutError(f"{key} is {shown(error['input'])}", expected, do)


def _place(location: tuple[int | str, ...]) -> tuple[str, type[BaseModel]]:
    """The dotted key at pydantic's location, less the names of union members, and the model that holds it."""
    model: type[BaseModel] = RunConfig
    keys: list[str] = []
    for part in map(str, location):
        keys.append(part)
        inner = _section(model.model_fields[part].annotation) if part in model.model_fields else None
        if inner is None or len(keys) == len(location):
            break
        model = inner
    return ".".join(keys), model


def _section(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
