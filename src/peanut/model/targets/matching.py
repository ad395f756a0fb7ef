"""Resolves ``target_modules`` and its like to module paths; a name that matches nothing is an error."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from ...errors import NoMatchingPeftModuleError, PeanutError, nearest
from ...protocols import Method, PeftConfig, WeightMethod, method_of
from ...weights.norm import is_norm
from .architectures import architecture_of, model_type_of
from .paths import (
    Modules,
    adaptable,
    bare,
    each_once,
    first_paths,
    inside_attention,
    kind_name,
    last_names,
    matched,
    modules_by_path,
    outside,
    starts,
    unknown_name,
    unmatched,
)
from .selection import selected
from .shape import is_pretrained
from .ties import are_to_be_tied, with_tied
from .tree import module_tree

__all__ = [
    "HEADS",
    "biased_paths",
    "heads_of",
    "is_all_linear",
    "matching_paths",
    "narrowed",
    "saved_paths",
    "target_paths",
]

HEADS: dict[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Heads that a task trains beside the adapter, whichever of them the model has."""


def heads_of(config: PeftConfig) -> tuple[str, ...]:
    """The names of the heads that the config's task trains."""
    return HEADS.get(config.task_type or "", ())


def is_all_linear(targets: list[str] | str | None) -> bool:
    """Whether ``target_modules`` is the word for every linear layer."""
    return isinstance(targets, str) and targets.lower() == "all-linear"


def target_paths(model: nn.Module, config: PeftConfig, method: WeightMethod[Any]) -> list[str]:
    """The paths of the layers that ``config`` names, in the model's order.

    Raises:
        PeanutError: a name, pattern or index names nothing; a named module cannot be adapted; nothing is left.
    """
    if not method.kinds:
        return _no_layer(model, config, method)
    modules = modules_by_path(model)
    left = narrowed(model, _named(model, config, method, modules), config, modules)
    for path in left:
        if not adaptable(modules[path], method.kinds):
            for name in _bare_parameters({path: modules[path]}, fused=True):
                raise _out_of_reach(f"target_modules matches '{path}'", name)
            kind = type(bare(modules[path]))
            theirs = kind.__module__.startswith("peft.")  # as load_adapter of transformers and diffusers makes them
            raise PeanutError(
                f"target_modules matches '{path}', a {'layer of Hugging Face PEFT' if theirs else kind.__name__}",
                f"layers of kind {', '.join(method.kinds)}",
                "call peanut.from_peft(model) first, which takes its adapters over"
                if theirs
                else "name the layers inside it or exclude it",
            )
    return left


def matching_paths(model: nn.Module, config: PeftConfig, method: Method[Any], modules: Modules) -> list[str]:
    """The paths of the modules, of any kind, that ``target_modules`` names.

    Raises:
        PeanutError: a name or pattern names nothing.
    """
    targets = config.target_modules
    assert targets is not None  # the callers have checked
    if is_all_linear(targets):
        return _all_linear(model, config, modules)
    hits = matched(modules, targets)
    wrong = unmatched(hits, targets)
    if wrong is not None:
        for name in matched(_bare_parameters(modules), wrong if isinstance(targets, str) else [wrong]):
            raise _out_of_reach(f"target_modules names {wrong!r}", name)
    if wrong is not None and isinstance(targets, str):
        raise NoMatchingPeftModuleError(
            f"target_modules={targets!r} matches no module path of {type(model).__name__}",
            "a regular expression for whole paths",
            f"adaptable layers are called {nearest(targets, _adaptable_names(modules, method), 6)}",
        )
    if wrong is not None:
        raise unknown_name("target_modules", wrong, model, _adaptable_names(modules, method), targets)
    return hits


def narrowed(model: nn.Module, paths: list[str], config: PeftConfig, modules: Modules) -> list[str]:
    """The paths that exclude_modules, layers_to_transform and the modules that are trained whole leave.

    A module that stands in several places has one weight, so it is adapted in all of them; its first path is given.

    Raises:
        PeanutError: an excluded name or an index names nothing, a module is never called or to be adapted in one of its
            places only, or nothing is left.
    """
    firsts = first_paths(modules)
    apart = set(outside(each_once(paths, modules), saved_paths(model, config)))
    there = [path for path in paths if firsts[path] in apart]
    left = selected(model, there, config, modules)
    chosen = set(left)
    for path in there:
        if (path in chosen) != (firsts[path] in chosen):
            raise PeanutError(
                f"'{path}' is the same module as '{firsts[path]}', and one of them is to be adapted",
                "both or neither, as they have one weight",
                "name both, or exclude both",
            )
    left = [path for path in left if firsts[path] == path]
    for path in left:
        if inside_attention(path, modules):
            raise PeanutError(
                f"'{path}' belongs to an nn.MultiheadAttention, which reads its weight and never calls it",
                "a module that is called",
                f"name '{path.rpartition('.')[0]}', of which both projections are adapted, or exclude it",
            )
    if not left:
        raise NoMatchingPeftModuleError(
            f"target_modules={config.target_modules!r} leaves no layer once modules_to_save, exclude_modules and "
            "layers_to_transform are taken away",
            "at least one layer",
            "change one of them",
        )
    return left


def saved_paths(model: nn.Module, config: PeftConfig) -> list[str]:
    """The paths of the modules that are trained whole: ``modules_to_save``, the task's heads, and what is tied to them.

    Raises:
        PeanutError: a name in ``modules_to_save`` names nothing.
    """
    heads, modules = heads_of(config), modules_by_path(model)
    found = _trained_whole(model, config, modules)
    for name in [*(config.modules_to_save or []), *heads]:
        # The end of a path counts, as in Hugging Face PEFT's files: "classifier" is DistilBERT's pre_classifier too.
        hits = [path for path in modules if path.endswith(name)]
        if not hits and name not in heads:
            raise unknown_name("modules_to_save", name, model, last_names(modules))
        found += hits
    found = each_once(found, modules)
    if found and are_to_be_tied(config):
        found = with_tied(model, modules, found)
    taken = frozenset(found)
    return [path for path in found if taken.isdisjoint(starts(path)[:-1])]


def biased_paths(model: nn.Module, config: PeftConfig, method: WeightMethod[Any]) -> list[str]:
    """The paths of all layers with a bias, but those in modules that are trained whole.

    Raises:
        PeanutError: something else than a layer that ``method`` knows has a bias.
    """
    modules, found = modules_by_path(model), []
    for path in outside(each_once(modules, modules), saved_paths(model, config)):
        if not isinstance(bare(modules[path])._parameters.get("bias"), nn.Parameter):
            continue
        if kind_name(modules[path]) not in method.kinds:
            raise PeanutError(
                f"'{path}', a {type(modules[path]).__name__}, has a bias",
                f"biases of layers of kind {', '.join(method.kinds)}",
                "name the layers whose biases are to be trained",
            )
        if not inside_attention(path, modules):
            found.append(path)
    return found


def _bare_parameters(modules: Modules, *, fused: bool = False) -> list[str]:
    """The paths of matrices that no layer of a known kind holds; if ``fused``, of stacked ones, as of fused experts."""
    return [
        f"{path}.{name}"
        for path, module in modules.items()
        if kind_name(module) is None
        for name, value in module.named_parameters(recurse=False)
        if (value.dim() == 3 and not isinstance(bare(module), _ConvNd) if fused else value.dim() > 1)
    ]


def _out_of_reach(found: str, parameter: str) -> PeanutError:
    return PeanutError(
        f"{found}, and '{parameter}' is a parameter that no layer of a known kind holds, as those of fused experts",
        "linear layers and their like",
        "name others: such a parameter cannot be adapted yet",
    )


def _trained_whole(model: nn.Module, config: PeftConfig, modules: Modules) -> list[str]:
    """The modules that a method which trains whole modules takes."""
    method = method_of(config.peft_type)
    if isinstance(method, WeightMethod) and method.trains == "named":
        if config.target_modules is None:
            raise PeanutError(
                f"{method.name} without target_modules",
                "names of modules to train whole",
                f"name some of {', '.join(sorted(last_names(modules))[:12])}",
            )
        return selected(model, matching_paths(model, config, method, modules), config, modules)
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


def _no_layer(model: nn.Module, config: PeftConfig, method: Method[Any]) -> list[str]:
    """The layers of a method that changes none: it trains whole modules or nothing."""
    saved = saved_paths(model, config)
    if config.target_modules is not None and method.trains != "named":
        raise PeanutError(
            f"target_modules={config.target_modules!r} for {method.name}, which changes no layer", do="leave it out"
        )
    if not saved:
        raise PeanutError(
            f"{method.name} without a head to train", "modules_to_save, or a task_type with a head", "name the head"
        )
    return []


def _named(model: nn.Module, config: PeftConfig, method: WeightMethod[Any], modules: Modules) -> list[str]:
    """The paths that ``target_modules`` names or, if it is open, those that the method changes in this architecture."""
    if config.target_modules is not None:
        return matching_paths(model, config, method, modules)
    if method.targets == "norms":
        hits = [path for path, module in modules.items() if kind_name(module) == "norm" and is_norm(bare(module))]
    elif method.targets == "biases":
        hits = biased_paths(model, config, method)
    elif method.targets == "embedding":
        embedding = _input_embeddings(model)
        hits = [path for path, module in modules.items() if embedding is not None and bare(module) is bare(embedding)]
    elif method.targets == "outputs":
        hits = matched(modules, architecture_of(model).feed_forward_outputs)
    else:
        hits = matched(modules, architecture_of(model).attention)
    if not hits:
        all_linear = ", or use 'all-linear'" if "linear" in method.kinds and method.targets != "embedding" else ""
        raise PeanutError(
            f"no default target_modules of {method.name} for {type(model).__name__} "
            f"(model_type {model_type_of(model)!r})",
            "target_modules",
            f"name some of {', '.join(sorted(_adaptable_names(modules, method))[:12])}{all_linear}, out of this tree:",
            detail=module_tree(model),
        )
    return hits


def _input_embeddings(model: nn.Module) -> nn.Module | None:
    """What a model, of transformers or written like one, says that its input embeddings are."""
    asked = getattr(model, "get_input_embeddings", None)
    try:
        found = asked() if callable(asked) else None
    except (AttributeError, NotImplementedError):  # of transformers' models without any
        return None
    return found if isinstance(found, nn.Module) else None


def _all_linear(model: nn.Module, config: PeftConfig, modules: Modules) -> list[str]:
    """Every linear layer but the output layer of a language model, or else the task's head."""
    output = model.get_output_embeddings() if is_pretrained(model) else None
    head = [path for path, module in modules.items() if output is not None and module is output]
    linear = [path for path, module in modules.items() if kind_name(module) in ("linear", "conv1d")]
    left = outside(linear, head or saved_paths(model, config))
    return [path for path in left if not inside_attention(path, modules)]


def _adaptable_names(modules: Modules, method: Method[Any]) -> set[str]:
    kinds = method.kinds
    return last_names(path for path, module in modules.items() if not kinds or adaptable(module, kinds))
