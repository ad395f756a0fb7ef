"""The base model's own weights, by the names that they have without adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from ..adapters.adapter_set import AdapterSet
from ..layers.adapted import Adapted, walk
from ..layers.layer import AdaptedLayer
from ..layers.saved_modules import SavedModule

__all__ = [
    "WRAPPERS",
    "base_statistics",
    "base_tensors",
    "embedding_paths",
    "embedding_weights",
    "has_other_vocabulary",
    "is_sharded",
    "plain_path",
    "rows_added",
    "saved_module_paths",
    "weights_moved_by_lookups",
]

WRAPPERS = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")
_INSIDE = ("base_layer", "original_module", "token_adapter")
"""What keys have between a layer's path and its weight where an adapter is around it; the last is the peer's."""
_STATISTICS = ("running_mean", "running_var")


def base_tensors(adapters: AdapterSet) -> dict[str, Tensor]:
    """The base's parameters by the path that they have without adapters, with the values before any merge."""
    found: dict[str, Tensor] = {}
    for path, outer, module in _base_modules(adapters.model):
        for leaf, value in module._parameters.items():
            if value is not None:
                found[f"{path}.{leaf}" if path else leaf] = value
        if isinstance(outer, AdaptedLayer) and outer.frozen.merged:
            before = {"weight": outer.frozen.weight, "bias": outer.frozen.bias()}
            found |= {f"{path}.{leaf}": value for leaf, value in before.items() if value is not None}
    return found


def base_statistics(adapters: AdapterSet) -> dict[str, Tensor]:
    """The statistics of batches that the base's norms hold, by path."""
    return {
        f"{path}.{leaf}" if path else leaf: value
        for path, _, module in _base_modules(adapters.model)
        for leaf, value in module._buffers.items()
        if value is not None and leaf in _STATISTICS
    }


def _base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """The base's modules: path, what stands there (an adapted layer, say), and the module itself."""
    waiting = [("", model)]
    while waiting:
        path, outer = waiting.pop()
        inner = outer.original_module if isinstance(outer, SavedModule) else outer
        if isinstance(inner, AdaptedLayer):
            outer, inner = inner, inner.base_layer
        elif isinstance(inner, Adapted):  # adapters of an output, or of the model's input
            continue
        yield path, outer, inner
        for name, child in reversed(inner._modules.items()):
            if child is not None:
                waiting.append((path if name in WRAPPERS else f"{path}.{name}" if path else name, child))


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP's first version is around modules of a model, or around the model itself."""
    return any(type(module).__name__ == "FullyShardedDataParallel" for module in walk(model))


def plain_path(key: str) -> str:
    """A key of a file or a state dict as the path of a parameter of a base without adapters."""
    return ".".join(part for part in key.split(".") if part not in _INSIDE)


def embedding_paths(adapters: AdapterSet) -> list[str]:
    """The paths of the base's input and output embedding, if it has them: of transformers' models."""
    wanted: list[Any] = []
    with suppress(AttributeError, NotImplementedError):
        wanted += [adapters.model.get_input_embeddings()]  # type: ignore[operator]
        wanted += [adapters.model.get_output_embeddings()]  # type: ignore[operator]
    modules = _base_modules(adapters.model) if wanted else ()
    return [path for path, outer, inner in modules if any(outer is own or inner is own for own in wanted)]


def embedding_weights(adapters: AdapterSet) -> set[str]:
    """The paths of the weights of the base's embeddings."""
    return {f"{path}.weight" for path in embedding_paths(adapters)}


def weights_moved_by_lookups(adapters: AdapterSet) -> set[str]:
    """The paths of the weights of embeddings with a ``max_norm``: each lookup shortens the rows that it finds."""
    return {
        f"{path}.weight"
        for path, _, module in _base_modules(adapters.model)
        if isinstance(module, nn.Embedding) and module.max_norm is not None
    }


def saved_module_paths(adapters: AdapterSet, name: str) -> list[str]:
    """The paths of the modules that adapter ``name`` trains whole: they take the place of the base's."""
    return [path for path, _ in adapters.saved_modules(name)]


def has_other_vocabulary(adapters: AdapterSet, name: str) -> bool:
    """Whether the base's vocabulary is of another size than that of the model that it was loaded from."""
    return rows_added(adapters, name) != 0


def rows_added(adapters: AdapterSet, name: str) -> int:
    """How many tokens the base's vocabulary has beyond that of the model that it was loaded from, or fewer.

    Its config is read if it is on this machine; nothing is fetched.
    """
    config: Any = getattr(adapters.model, "config", None)
    source = getattr(config, "_name_or_path", None) or adapters.configs[name].base_model_name_or_path
    if not source or not hasattr(type(config), "from_pretrained"):
        return 0
    try:
        before = type(config).from_pretrained(
            source, local_files_only=True, revision=adapters.configs[name].revision or "main"
        )
    except Exception:  # it is not here, or damaged, which is reported in many ways
        return 0
    sizes = [int(getattr(own.get_text_config(), "vocab_size", None) or 0) for own in (before, config)]
    return sizes[1] - sizes[0]
