"""The modules whose output a method changes (bottleneck adapters, ReFT, adaption prompts), by architecture or name."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from ...errors import PeanutError
from ...protocols import OutputMethod, PeftConfig, Site, Stack
from ...weights import FrozenLayer, kind_of
from .architectures import architecture_of, model_type_of
from .matching import matching_paths, narrowed
from .paths import Modules, bare, each_once, modules_by_path
from .shape import reading_stack
from .tree import module_tree

__all__ = ["sites"]


def sites(model: nn.Module, config: PeftConfig, method: OutputMethod[Any]) -> list[Site]:
    """The modules whose output ``method`` changes, in the model's order.

    Raises:
        PeanutError: the architecture is not known and the config names no modules; it names none that are there; what
            it names has no last dimension to change; nothing is left.
    """
    modules, stacks = modules_by_path(model), architecture_of(model).stacks
    settings = getattr(model, "config", None)
    if config.target_modules is None:
        if not stacks:
            raise PeanutError(
                f"no default places of {method.name} for {type(model).__name__} (model_type {model_type_of(model)!r})",
                "target_modules",
                "name the modules whose output is to be changed, for instance target_modules=['down_proj'] (every "
                "path that ends so) or a regular expression for whole paths, out of this tree:",
                detail=module_tree(model),
            )
        found = each_once(_default_paths(modules, stacks, method, config), modules)
        left = narrowed(model, found, config, modules) if found else []
    else:
        found = left = narrowed(model, matching_paths(model, config, method, modules), config, modules)
        _refuse_writers(model, left, modules, method)
    blocks = {path: _block(path, stacks) for path in found}
    counts: dict[str, int] = {}
    for stack, number in blocks.values():
        counts[stack] = max(counts.get(stack, 0), number + 1)
    made = []
    for path in left:
        stack, number = blocks[path]
        if method.chosen(config, number, counts[stack]):
            place = method.source(config) if config.target_modules is None else None
            source = None if place is None else _source(path, place, stacks, modules)
            width, reads = _sizes(modules[path], path, settings, heard=source is not None)
            made.append(Site(path, width, reads, bare(modules[path]), (number, counts[stack]), source, settings))
    if not made:
        raise PeanutError(
            f"{method.name} finds no module to change in {type(model).__name__}",
            "at least one",
            "name modules in target_modules, out of this tree:",
            detail=module_tree(model),
        )
    return made


def _refuse_writers(model: nn.Module, paths: list[str], modules: Modules, method: OutputMethod[Any]) -> None:
    """Refuses modules of a decoder beside an encoder if the method looks at the tokens that the encoder reads."""
    if not method.reads_prompt or not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return
    inside = set(reading_stack(model).modules())
    for path in paths:
        if modules[path] not in inside:
            raise PeanutError(
                f"'{path}' does not lie in the encoder, and {method.name} acts on the tokens that are read there",
                "modules of the encoder",
                "name those, by a regular expression for whole paths",
            )


def _default_paths(
    modules: Modules, stacks: tuple[Stack, ...], method: OutputMethod[Any], config: PeftConfig
) -> list[str]:
    """The paths of the places that the method changes, in the model's order."""
    patterns = [
        stack.paths(place)
        for place in method.places(config)
        for stack in stacks
        if not (stack.writes and method.reads_prompt)
    ]
    return [path for path in modules if any(re.fullmatch(pattern, path) for pattern in patterns)]


def _source(path: str, place: str, stacks: tuple[Stack, ...], modules: Modules) -> str:
    """The path of the module in the same block whose input is x for the module at ``path``."""
    stack, block = next((each, found) for each in stacks if (found := re.match(each.block, path)))
    pattern = rf"{re.escape(block.group())}\.(?:{getattr(stack, place)})"
    return next(path for path in modules if re.fullmatch(pattern, path))


def _block(path: str, stacks: tuple[Stack, ...]) -> tuple[str, int]:
    """The stack that ``path`` lies in and the number of its block there; ("", 0) if there are no numbers."""
    known = [rf"(?:{each.block})(?:\.|$)" for each in stacks]
    for pattern in [*known, r"(?:.*?\.)??[^.]*\.(\d+)(?:\.|$)"]:
        match = re.match(pattern, path)
        if match:
            return path[: match.start(1)], int(match.group(1))
    return "", 0


def _sizes(module: nn.Module, path: str, settings: object, *, heard: bool) -> tuple[int, int]:
    """The sizes of the last dimension of a module's output, and of x, which is the stream's if it is ``heard``."""
    kind, stream = kind_of(bare(module)), getattr(settings, "hidden_size", None)
    sizes: tuple[Any, Any] = stream, stream
    if (kind is not None and kind.name == "conv") or isinstance(bare(module), nn.GroupNorm):
        raise PeanutError(
            f"'{path}' is a {type(bare(module)).__name__}, whose output has its channels first",
            "a module whose output ends in the dimension to change",
            "name other modules",
        )
    if kind is not None and kind.name == "norm":
        weight: Any = bare(module).weight
        sizes = weight.shape[-1], weight.shape[-1]
    elif kind is not None:
        layer = FrozenLayer(bare(module), kind)
        sizes = layer.out_features, stream if heard else layer.in_features
    if not all(isinstance(size, int) for size in sizes):
        raise PeanutError(
            f"a {type(bare(module)).__name__} ('{path}') does not tell the width of its output, nor does the model's "
            "config",
            "a module like a linear layer, or a config with hidden_size",
            "name linear layers in target_modules",
        )
    return sizes
