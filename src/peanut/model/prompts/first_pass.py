"""The first pass of a mixture (X-LoRA): hidden states of the base model, from which the gates are computed."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...errors import PeanutError
from ..layers.calls import Running
from ..layers.input import AdaptedMixture
from ..layers.state import AdapterState
from .cache import cache_in, put_cache
from .prefix import check_grows, filled, length_of
from .reader import Reader

if TYPE_CHECKING:
    from transformers import Cache

__all__ = ["gates_of"]

Gates = dict[str, dict[str, list[tuple[str, Tensor]]]]

_NOT_FOR_IT = ("labels", "output_attentions", "output_hidden_states", "return_dict", "use_cache")
"""Arguments of the backbone that the first pass does not need, or sets itself."""
_TWINS: weakref.WeakKeyDictionary[Cache, dict[str, Cache]] = weakref.WeakKeyDictionary()
"""For each cache of an adapted model, those of its first passes: keys and values differ where experts act."""
_BARE = ""
"""The name of the first pass of the base alone, which mixtures share."""


def gates_of(
    mixtures: AdaptedMixture, state: AdapterState, reader: Reader, arguments: dict[str, Any], running: Running
) -> Gates:
    """The gates of every mixture that acts, by layer, for a batch that is about to run.

    Args:
        mixtures: the mixtures.
        reader: the model.
        arguments: what it is called with; a cache is put there where one is begun.
        running: what is known of the batch.

    Raises:
        PeanutError: an adapter is merged, or a cache was begun without the mixture.
    """
    if state.merged:
        raise PeanutError(
            f"mixture {mixtures.acting()[0]!r} while {state.merged[0]!r} is merged: its gates read the bare base",
            "an unmerged model",
            "call unmerge_adapter() first",
        )
    found: Gates = {}
    bare: Tensor | None = None
    for name in mixtures.acting():
        method, config = mixtures.method_of(name)
        paths, experts = mixtures.layers[name], mixtures.experts(name)
        fixed = method.first_pass(config)
        if fixed:
            read = arguments.get("input_ids")
            read = arguments["inputs_embeds"] if read is None else read
            size = (*read.shape[:2], len(paths), len(experts))
            flat = torch.full(size, fixed, device=read.device, dtype=torch.float32)
            constant = {name: _by_path(method.applied(config, flat), paths, experts)}
            hidden = _hidden(state, reader, arguments, replace(running, gates=constant), name)
        else:
            bare = hidden = _hidden(state, reader, arguments, running, _BARE) if bare is None else bare
        gates = method.gates(config, mixtures.values(name), hidden, len(paths), mixtures.training)
        mixtures.latest[name] = gates.detach()
        if mixtures.logging:
            mixtures.log.setdefault(name, []).append(gates.detach())
        found[name] = _by_path(method.applied(config, gates), paths, experts)
        _for_head(found[name], reader.stack, arguments.get("logits_to_keep"))
    return found


def _by_path(gates: Tensor, paths: list[str], experts: list[str]) -> dict[str, list[tuple[str, Tensor]]]:
    return {
        path: [(expert, gates[:, :, layer, number, None]) for number, expert in enumerate(experts)]
        for layer, path in enumerate(paths)
    }


def _for_head(gates: dict[str, list[tuple[str, Tensor]]], stack: nn.Module, kept: int | Tensor | None) -> None:
    """Keeps the gates of those tokens for which the head computes logits."""
    head: Any = stack.get_output_embeddings()  # type: ignore[operator]
    path = getattr(head, "path", None)
    if path in gates and isinstance(kept, (int, Tensor)):
        which = slice(-kept, None) if isinstance(kept, int) else kept
        gates[path] = [(expert, gate[:, which]) for expert, gate in gates[path]]


@torch.no_grad()
def _hidden(state: AdapterState, reader: Reader, arguments: dict[str, Any], running: Running, name: str) -> Tensor:
    """The last hidden states of the model without adapters, or with the experts of ``name`` at the gates given."""
    backbone: Any = reader.stack.base_model
    known = reader.inner
    given = {key: value for key, value in arguments.items() if key in known and key not in _NOT_FOR_IT}
    cache = _twin(reader, arguments, running, name)
    if reader.cache is not None:
        put_cache(given, reader.cache, cache)
        given["use_cache"] = cache is not None
    with state.during(active=[name], off=name == _BARE, running=running), _without_checkpoints(backbone):
        output = backbone.forward(**given, return_dict=True)
    hidden: Tensor = output.last_hidden_state
    return hidden


_NOT_CHECKPOINTED = threading.Lock()


@contextmanager
def _without_checkpoints(backbone: nn.Module) -> Iterator[None]:
    """Turns gradient checkpointing off, which would not pass the cache on; there is no backward here."""
    blocks = backbone.modules() if backbone.training else ()
    if not any(getattr(module, "gradient_checkpointing", False) for module in blocks):
        yield
        return
    with _NOT_CHECKPOINTED:  # else another thread's first pass would begin or end amid this one
        again: list[Any] = [module for module in backbone.modules() if getattr(module, "gradient_checkpointing", False)]
        for module in again:
            module.gradient_checkpointing = False
        try:
            yield
        finally:
            for module in again:
                module.gradient_checkpointing = True


def _twin(reader: Reader, arguments: dict[str, Any], running: Running, name: str) -> Cache | None:
    """The cache of the first passes that goes with the cache of the batch, ``None`` if nothing is cached."""
    from transformers import DynamicCache

    past, stack = cache_in(arguments), reader.stack
    settings = stack.config
    if past is None:
        uses = arguments.get("use_cache")
        if stack.training or not (stack.can_generate() and settings.use_cache if uses is None else uses):
            return None
        past = DynamicCache(config=settings.get_text_config(decoder=True))
        put_cache(arguments, reader.cache, past)
    check_grows(past)
    if past not in _TWINS:
        _TWINS[past] = {}
        for change in ("reorder_cache", "batch_repeat_interleave", "batch_select_indices", "crop", "reset"):
            _together(past, _TWINS[past], change)
    twins, prefix = _TWINS[past], running.prefix
    if length_of(past) > (0 if prefix is None else prefix.get_seq_length()):
        if length_of(twins.get(name)) != length_of(past):
            raise PeanutError(
                f"a cache of {length_of(past)} tokens, not all of which the mixture has seen",
                "a cache from the first token on",
                "begin with an empty cache, and keep the mixture active",
            )
        return twins[name]
    twin: Any = DynamicCache(config=settings.get_text_config(decoder=True))
    twins[name] = twin if prefix is None else filled(twin, prefix.values, settings)
    return twins[name]


def _together(past: Any, twins: dict[str, Any], change: str) -> None:
    """Lets a change of a cache (beams that go on, rows that are left out) change its twins too."""
    function, one = getattr(type(past), change), weakref.ref(past)  # weak, so that no cycle keeps caches alive

    def both(*args: Any, **kwargs: Any) -> Any:
        for twin in twins.values():
            getattr(twin, change)(*args, **kwargs)
        return function(one(), *args, **kwargs)

    setattr(past, change, both)
