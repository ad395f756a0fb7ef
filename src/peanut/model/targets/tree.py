"""A model's module tree as text, for error messages; equal neighbours are shown once."""

from __future__ import annotations

from torch import nn

__all__ = ["module_tree"]


def module_tree(model: nn.Module, deepest: int = 6) -> str:
    """The modules of ``model`` with their classes, one a line; numbered ones that are alike are shown once, as 0-11."""
    lines = [type(model).__name__]
    _grow(model, 1, deepest, lines)
    return "\n".join(lines)


def _grow(module: nn.Module, depth: int, deepest: int, lines: list[str]) -> None:
    if depth > deepest:
        return
    children = [(name, child) for name, child in module.named_children() if not name.startswith("adapted_")]
    while children:
        name, child = children.pop(0)
        last, form = name, _form(child)
        while name.isdigit() and children and children[0][0].isdigit() and _form(children[0][1]) == form:
            last = children.pop(0)[0]
        label = name if last == name else f"{name}-{last}"
        lines.append(f"{'  ' * depth}{label}: {_described(child)}")
        _grow(child, depth + 1, deepest, lines)


def _described(module: nn.Module) -> str:
    name, weight = type(module).__name__, getattr(module, "weight", None)
    return f"{name}{tuple(weight.shape)}" if weight is not None and not list(module.children()) else name


def _form(module: nn.Module) -> list[tuple[str, str]]:
    return [(name, _described(child)) for name, child in module.named_modules()]
