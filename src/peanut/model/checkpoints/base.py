"""The base model's own weights: by the names that they have without adapters, and those that an adapter saves."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, Literal

from torch import Tensor, nn

from ...errors import PeanutError
from ..adapters.adapter_set import AdapterSet
from ..layers.adapted import Adapted
from ..layers.layer import AdaptedLayer
from ..layers.saved_modules import SavedModule
from ..targets.matching import is_all_linear

__all__ = ["WRAPPERS", "SaveEmbeddings", "base_tensors", "embedding_paths", "plain_path", "saved_embeddings", "whole"]

SaveEmbeddings = bool | Literal["auto"]

WRAPPERS = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")
_INSIDE = ("base_layer", "original_module", "token_adapter")
"""What keys have between a layer's path and its weight where an adapter is around it; the last is the peer's."""
_NAMED = ("embed_tokens", "lm_head")
"""The embeddings that the peer saves where they are targets, by name."""


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


def whole(adapters: AdapterSet, name: str) -> list[str]:
    """The paths of the modules that adapter ``name`` trains whole: they take the place of the base's."""
    return [path for path, _ in adapters.saved_modules(name)]


def saved_embeddings(
    adapters: AdapterSet, name: str, save: SaveEmbeddings, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The base's embeddings that are saved with adapter ``name``, by the keys that Hugging Face PEFT gives them.

    Args:
        save: ``True``, ``False``, or ``"auto"``: those that are named as targets, and both if the base has another
            vocabulary than the model that it was loaded from.
        state_dict: base tensors by their plain path, to take the values from.

    Raises:
        PeanutError: ``save`` is something else, or an embedding is not there as numbers.
    """
    if save is not True and save is not False and save != "auto":
        raise PeanutError(f"save_embedding_layers={save!r}", "'auto', True or False", "change it")
    if save is False:
        return {}
    paths = [path for path in embedding_paths(adapters) if path not in whole(adapters, name)]
    layers = {path: layer for path, layer in adapters.layers(name) if path in paths}
    if save is True and not paths and not whole(adapters, name):
        warnings.warn(f"{type(adapters.model).__name__} has no embeddings that could be saved", stacklevel=2)
    needed = save is True or (bool(paths) and _has_other_vocabulary(adapters, name))
    if not needed:
        paths = [path for path in layers if _is_named(adapters, name, path)]
    found: dict[str, Tensor] = {}
    for path, value in base_tensors(adapters).items() if paths else ():
        module, _, leaf = path.rpartition(".")
        if module not in paths:
            continue
        own = (state_dict or {}).get(path, value).detach()
        if own.is_meta or not own.is_floating_point():
            if not needed:
                continue  # it is as it was, as codes are never changed
            raise PeanutError(
                f"'{path}' is {'on the meta device' if own.is_meta else 'quantised'}, and is to be saved",
                "embeddings that are numbers",
                "load the base without quantising or offloading it, or pass save_embedding_layers=False",
            )
        inside = f"{_inside(adapters, name, layers[module])}." if module in layers else ""
        found[f"{module}.{inside}{leaf}"] = own
    return found


def _inside(adapters: AdapterSet, name: str, layer: AdaptedLayer) -> str:
    """What the peer's keys have before the weight of an embedding that is adapted, or has tokens trained beside."""
    return "base_layer" if layer.method_of(name)[0] == adapters.method(name) else "token_adapter.base_layer"


def _is_named(adapters: AdapterSet, name: str, path: str) -> bool:
    """Whether an adapted embedding is one that the config names, and not for the sake of some tokens."""
    config = adapters.configs[name]
    targets, tokens = config.target_modules, getattr(config, "trainable_token_indices", None)
    named = targets is not None and not is_all_linear(targets) and path.rpartition(".")[2] in _NAMED
    return named and tokens is None and config.peft_type != "TRAINABLE_TOKENS"


def _has_other_vocabulary(adapters: AdapterSet, name: str) -> bool:
    """Whether the base's vocabulary is of another size than that of the model that it was loaded from.

    Its config is read if it is on this machine; nothing is fetched.
    """
    config: Any = getattr(adapters.model, "config", None)
    source = adapters.configs[name].base_model_name_or_path or getattr(config, "_name_or_path", None)
    if not source or not hasattr(type(config), "from_pretrained"):
        return False
    try:
        before = type(config).from_pretrained(
            source, local_files_only=True, revision=adapters.configs[name].revision or "main"
        )
    except Exception:  # it is not here, or damaged, which is told in many ways
        return False
    sizes = [getattr(own.get_text_config(), "vocab_size", None) for own in (before, config)]
    return sizes[0] != sizes[1]
