"""From a config's patterns to the layers that they name; what names nothing is an error."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from ...errors import PeanutError, nearest
from ...protocols import Method, PeftConfig, WeightMethod, method_of
from ...weights import kind_of
from ..layers.layer import AdaptedLayer
from ..layers.saved_modules import SavedModule
from .defaults import DEFAULT_TARGETS, FEED_FORWARD_OUTPUTS, HEADS
from .shape import is_pretrained
from .tree import module_tree

__all__ = [
    "ALL_LINEAR",
    "HOLDERS",
    "bare",
    "biased_paths",
    "modules_by_path",
    "named_paths",
    "narrowed",
    "saved_paths",
    "target_paths",
]

ALL_LINEAR = "all-linear"
HOLDERS = ("adapted_output", "adapted_input", "adapted_mixture")
"""Names under which a model's modules hold the adapters that change no weight."""


def modules_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """The base model's modules by path; of an adapted layer only the layer, not what is inside."""
    found: dict[str, nn.Module] = {}

    def visit(module: nn.Module, path: str) -> None:
        if path:
            found[path] = module
        if isinstance(module, AdaptedLayer):
            return
        inner = module.original_module if isinstance(module, SavedModule) else module
        for name, child in inner.named_children():
            if name in HOLDERS:
                continue
            visit(child, f"{path}.{name}" if path else name)

    visit(model, "")
    return found


def bare(module: nn.Module) -> nn.Module:
    """A layer without the adapters around it."""
    return module.base_layer if isinstance(module, AdaptedLayer) else module


def biased_paths(model: nn.Module, method: WeightMethod[Any], outside: list[str]) -> list[str]:
    """The paths of all layers with a bias, but those in modules that are trained whole.

    Raises:
        PeanutError: something else than a layer that ``method`` knows has a bias.
    """
    found = []
    for path, module in modules_by_path(model).items():
        if any(path == head or path.startswith(f"{head}.") for head in outside):
            continue
        if not isinstance(bare(module)._parameters.get("bias"), nn.Parameter):
            continue
        if _kind_name(module) not in method.kinds:
            raise PeanutError(
                f"'{path}', a {type(module).__name__}, has a bias",
                f"biases of layers of kind {', '.join(method.kinds)}",
                "name the layers whose biases are to be trained",
            )
        if not _inside_attention(path, modules_by_path(model)):
            found.append(path)
    return found


def target_paths(model: nn.Module, config: PeftConfig, method: WeightMethod[Any]) -> list[str]:
    """The paths of the layers that ``config`` names, in the model's order.

    Raises:
        PeanutError: a name, pattern or index names nothing; a named module cannot be adapted; nothing is left.
    """
    saved = saved_paths(model, config)
    if not method.kinds:
        return _no_layer(config, method, saved)
    modules = modules_by_path(model)
    named = _named(model, config, method, modules)
    kept = [path for path in named if not any(path == head or path.startswith(f"{head}.") for head in saved)]
    kept = _without_excluded(kept, config, modules)
    kept = _within_layers(kept, config)
    if not kept:
        raise PeanutError(
            f"target_modules={config.target_modules!r} leaves no layer once modules_to_save, exclude_modules and "
            "layers_to_transform are taken away",
            "at least one layer",
            "change one of them",
        )
    for path in kept:
        _check_adaptable(path, modules, method)
    return kept


def saved_paths(model: nn.Module, config: PeftConfig) -> list[str]:
    """The paths of the modules that are trained whole: ``modules_to_save`` and the task's heads.

    Raises:
        PeanutError: a name in ``modules_to_save`` names nothing.
    """
    heads = HEADS.get(str(getattr(config.task_type, "value", config.task_type)), ())
    modules = modules_by_path(model)
    paths = list(modules)
    found = _whole(model, config, modules)
    for name in [*(config.modules_to_save or []), *heads]:
        # Of a task's heads the end of the name counts, as in the peer: DistilBERT's has a pre_classifier too.
        hits = [path for path in paths if path.endswith(name) if name in heads or _ends_in(path, name)]
        if not hits and name not in heads:
            raise PeanutError(
                f"modules_to_save names {name!r}, which no module of {type(model).__name__} is called",
                "names of modules",
                f"nearest: {nearest(name, _names(paths))}",
            )
        found += [path for path in hits if path not in found]
    return [path for path in found if not any(path.startswith(f"{outer}.") for outer in found)]


def _whole(model: nn.Module, config: PeftConfig, modules: dict[str, nn.Module]) -> list[str]:
    """The modules that a method which trains whole modules takes."""
    method = method_of(config.peft_type)
    if isinstance(method, WeightMethod) and method.trains == "named":
        if config.target_modules is None:
            raise PeanutError(
                f"{method.name} without target_modules",
                "names of modules to train whole",
                f"name some of {', '.join(sorted(_names(modules))[:12])}",
            )
        named = _named(model, config, method, modules)
        return _within_layers(_without_excluded(named, config, modules), config)
    if method.trains == "all":
        own = [name for name, _ in model.named_parameters(recurse=False)]
        if own:
            raise PeanutError(
                f"parameter {own[0]!r} belongs to {type(model).__name__} itself",
                "parameters in modules of the model",
                "put the model into another module, or use PARTIAL",
            )
        holders = {name.partition(".")[0] for name, _ in model.named_parameters(remove_duplicate=False)}
        return [name for name, _ in model.named_children() if name in holders]
    return []


def _no_layer(config: PeftConfig, method: Method[Any], saved: list[str]) -> list[str]:
    """The layers of a method that changes none: it trains whole modules or nothing."""
    if config.target_modules is not None and method.trains != "named":
        raise PeanutError(
            f"target_modules={config.target_modules!r} for {method.name}, which changes no layer", do="leave it out"
        )
    if not saved:
        raise PeanutError(
            f"{method.name} without a head to train", "modules_to_save, or a task_type with a head", "name the head"
        )
    return []


def _named(model: nn.Module, config: PeftConfig, method: WeightMethod[Any], modules: dict[str, nn.Module]) -> list[str]:
    """The paths that ``target_modules`` names or, if it is open, the method's own, before anything is taken away."""
    if config.target_modules is None:
        return _default(model, config, method, modules)
    return _matching(model, config, method, modules)


def named_paths(model: nn.Module, config: PeftConfig, method: Method[Any], modules: dict[str, nn.Module]) -> list[str]:
    """The paths of the modules, of any kind, that ``target_modules`` names.

    Raises:
        PeanutError: a name, pattern or index names nothing, or nothing is left.
    """
    return narrowed(model, _matching(model, config, method, modules), config, modules)


def narrowed(model: nn.Module, paths: list[str], config: PeftConfig, modules: dict[str, nn.Module]) -> list[str]:
    """The paths that exclude_modules, layers_to_transform and the modules that are trained whole leave.

    Raises:
        PeanutError: an excluded name or an index names nothing, or nothing is left.
    """
    saved = saved_paths(model, config)
    kept = [path for path in paths if not any(path == head or path.startswith(f"{head}.") for head in saved)]
    left = _within_layers(_without_excluded(kept, config, modules), config)
    for path in left:
        if _inside_attention(path, modules):
            raise PeanutError(
                f"'{path}' belongs to an nn.MultiheadAttention, which reads its weight and never calls it",
                "a module that is called",
                "exclude it",
            )
    if not left:
        raise PeanutError(
            f"target_modules={config.target_modules!r} leaves no module once modules_to_save, exclude_modules and "
            "layers_to_transform are taken away",
            "at least one module",
            "change one of them",
        )
    return left


def _matching(model: nn.Module, config: PeftConfig, method: Method[Any], modules: dict[str, nn.Module]) -> list[str]:
    targets = config.target_modules
    assert targets is not None  # the callers have looked
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return _all_linear(model, config, modules)
    if isinstance(targets, str):
        hits = [path for path in modules if re.fullmatch(targets, path)]
        if not hits:
            raise PeanutError(
                f"target_modules={targets!r} matches no module path of {type(model).__name__}",
                "a regular expression for whole paths",
                f"adaptable layers are called {nearest(targets, _adaptable_names(modules, method), 6)}",
            )
        return hits
    found = {path: _ends(path).intersection(targets) for path in modules}
    hits = [path for path, names in found.items() if names]
    there = set().union(*found.values())
    for name in targets:
        if name not in there:
            raise PeanutError(
                f"target_modules names {name!r}, which no module of {type(model).__name__} is called",
                "names of layers",
                f"nearest: {nearest(name, _adaptable_names(modules, method))}",
            )
    return hits


def _default(
    model: nn.Module, config: PeftConfig, method: WeightMethod[Any], modules: dict[str, nn.Module]
) -> list[str]:
    """The layers that the method changes in this architecture where the config names none."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if method.targets == "norms":
        hits = [path for path, module in modules.items() if _kind_name(module) == "norm"]
    elif method.targets == "biases":
        hits = biased_paths(model, method, saved_paths(model, config))
    elif method.targets == "embedding":
        embedding = model.get_input_embeddings() if is_pretrained(model) else None
        hits = [path for path, module in modules.items() if embedding is not None and bare(module) is bare(embedding)]
    elif method.targets == "outputs":
        hits = [path for path in modules if re.fullmatch(FEED_FORWARD_OUTPUTS.get(str(model_type), "(?!)"), path)]
    else:
        names = DEFAULT_TARGETS.get(str(model_type), [])
        hits = [path for path in modules if any(_ends_in(path, name) for name in names)]
    if not hits:
        all_linear = ", or use 'all-linear'" if "linear" in method.kinds else ""
        raise PeanutError(
            f"no default target_modules of {method.name} for {type(model).__name__} (model_type {model_type!r})",
            "target_modules",
            f"name some of {', '.join(sorted(_adaptable_names(modules, method))[:12])}{all_linear}, out of this tree:",
            detail=module_tree(model),
        )
    return hits


def _all_linear(model: nn.Module, config: PeftConfig, modules: dict[str, nn.Module]) -> list[str]:
    """Every linear layer but the output layer of a language model, or else the task's head."""
    output = model.get_output_embeddings() if is_pretrained(model) else None
    head = [path for path, module in modules.items() if output is not None and module is output]
    if not head:
        head = saved_paths(model, config)
    linear = [path for path, module in modules.items() if _kind_name(module) in ("linear", "conv1d")]
    return [
        path
        for path in linear
        if not any(path == name or path.startswith(f"{name}.") for name in head)
        and not _inside_attention(path, modules)
    ]


def _without_excluded(paths: list[str], config: PeftConfig, modules: dict[str, nn.Module]) -> list[str]:
    excluded = config.exclude_modules
    if not excluded:
        return paths
    if isinstance(excluded, str):
        hits = {path for path in modules if re.fullmatch(excluded, path)}
        unmatched = [] if hits else [excluded]
    else:
        hits = {path for path in modules if any(_ends_in(path, name) for name in excluded)}
        unmatched = [name for name in excluded if not any(_ends_in(path, name) for path in hits)]
    if unmatched:
        raise PeanutError(
            f"exclude_modules names {unmatched[0]!r}, which no module is called",
            "names of modules",
            f"nearest: {nearest(unmatched[0], _names(modules))}",
        )
    return [path for path in paths if path not in hits]


def _within_layers(paths: list[str], config: PeftConfig) -> list[str]:
    wanted = config.layers_to_transform
    if wanted is None:
        return paths
    indices = [wanted] if isinstance(wanted, int) else list(wanted)
    by_path = {path: _block_index(path, config.layers_pattern) for path in paths}
    present = sorted({index for index in by_path.values() if index is not None})
    missing = [index for index in indices if index not in present]
    if missing:
        blocks = f"blocks {present[0]} to {present[-1]}" if present else "no numbered block"
        pattern = f" under layers_pattern={config.layers_pattern!r}" if config.layers_pattern else ""
        raise PeanutError(
            f"layers_to_transform names {missing}, and the targets lie in {blocks}{pattern}",
            "indices of blocks that hold a target",
            "change layers_to_transform or layers_pattern",
        )
    return [path for path in paths if by_path[path] in indices]


def _block_index(path: str, pattern: list[str] | str | None) -> int | None:
    """The index of the block that ``path`` is or lies in: the first number after a list called as the pattern says."""
    lists = [pattern] if isinstance(pattern, str) else pattern or [r"[^.]*"]
    for name in lists:
        match = re.match(rf"(?:.*?\.)??{name}\.(\d+)\.", f"{path}.")
        if match:
            return int(match.group(1))
    return None


def _check_adaptable(path: str, modules: dict[str, nn.Module], method: WeightMethod[Any]) -> None:
    module = modules[path]
    if _inside_attention(path, modules):
        raise PeanutError(
            f"'{path}' belongs to an nn.MultiheadAttention, which reads its weight and never calls it",
            "a layer that is called",
            "exclude it",
        )
    kind = _kind_name(module)
    if kind not in method.kinds:
        raise PeanutError(
            f"target_modules matches '{path}', a {type(bare(module)).__name__}",
            f"layers of kind {', '.join(method.kinds)}",
            "name the layers inside it or exclude it",
        )


def _inside_attention(path: str, modules: dict[str, nn.Module]) -> bool:
    return isinstance(modules.get(path.rpartition(".")[0]), nn.MultiheadAttention)


def _kind_name(module: nn.Module) -> str | None:
    kind = kind_of(bare(module))
    return None if kind is None else kind.name


def _ends_in(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _ends(path: str) -> set[str]:
    """All names that ``_ends_in`` finds at the end of a path."""
    names = path.split(".")
    return {".".join(names[first:]) for first in range(len(names))}


def _names(paths: Iterable[str]) -> set[str]:
    return {path.rpartition(".")[2] for path in paths}


def _adaptable_names(modules: dict[str, nn.Module], method: Method[Any]) -> set[str]:
    if not method.kinds:
        return _names(modules)
    return _names(path for path, module in modules.items() if _kind_name(module) in method.kinds)
