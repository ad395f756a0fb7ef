"""Command-line flags that set keys of the run's config: ``--training.epochs 3``, ``--adapter.r=8``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from ..errors import PeanutError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

__all__ = ["config_keys", "parse_flags"]


def parse_flags(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Dotted key → value, read as YAML; and what is no flag.

    Args:
        arguments: what typer did not know: ``--key VALUE`` or ``--key=VALUE``.

    Raises:
        PeanutError: a flag has no value.
    """
    from ..training.config import parse_yaml

    text = {key for key, annotation, _ in config_keys() if annotation in (str, str | None)}
    values: dict[str, Any] = {}
    others: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            others.append(argument)
            continue
        key, given, value = argument.removeprefix("--").partition("=")
        if not given:
            if not rest or rest[0].startswith("--"):
                raise PeanutError(f"the flag '--{key}' has no value", f"--{key} VALUE", "give one")
            value = rest.pop(0)
        values[key] = value if key in text and value != "null" else parse_yaml(value)
    return values, others


def config_keys() -> Iterator[tuple[str, Any, str]]:
    """Every key of a run's config with its type and its default as text."""
    from pydantic import BaseModel

    from ..training.sections import RunConfig

    for name, field in RunConfig.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            for inner, info in kind.model_fields.items():
                yield f"{name}.{inner}", info.annotation, _default(info)
        else:
            yield name, kind, _default(field)


def _default(field: FieldInfo) -> str:
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    default = "required" if field.is_required() else "" if field.default is None else str(field.default)
    others = [choice for choice in choices if choice != default]
    return f"{default} ({', '.join(others)})" if others else default
