"""What scripts for Hugging Face PEFT do that has one sensible meaning: it is done, and one warning says what."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import PeanutError, warn
from ..protocols import PeftConfig
from .adapters.adapter_set import AdapterSet, experts_of
from .checkpoints.mixtures import name_for

__all__ = ["activate", "delete", "make_room"]


def make_room(adapters: AdapterSet, name: str, config: PeftConfig) -> None:
    """Takes adapter ``name`` out, so that one with ``config`` can take its place: a cell of a notebook is run again.

    Raises:
        PeanutError: the new adapter would be refused. Nothing is then changed.
    """
    name = name_for(adapters, config, name)
    if name not in adapters.configs:
        return
    merged = list(adapters.state.merged)
    adapters.unmerge()
    trial = f"{name} on trial"
    try:
        if not experts_of(config):
            with torch.random.fork_rng(devices=[]):
                adapters.add(trial, config, meta=True, copies=False)
            adapters.delete(trial)
        adapters.delete(name)
    except BaseException:
        if merged:
            adapters.merge(merged)
        raise
    warn(
        f"the model has an adapter {name!r} already: a new one takes its place, and what it has learned is lost; to "
        "keep both, give the new one another adapter_name; to begin with the bare base, call unload() first",
    )


def delete(adapters: AdapterSet, name: str) -> None:
    """Takes an adapter out; if it was the only active one, another becomes active, trained if this one was."""
    active, trained = adapters.state.active, name in adapters.trained
    adapters.delete(name)
    mixed = {expert for config in adapters.configs.values() for expert in experts_of(config)}
    left = [other for other in adapters.configs if other not in mixed]
    if name in active and not adapters.state.active and left:
        adapters.activate(left[0], trainable=trained)
        warn(f"adapter {name!r}, which is deleted, was active; {left[0]!r} is active now")


def activate(adapters: AdapterSet, names: str | Sequence[str], *, trainable: bool = True) -> None:
    """Makes exactly ``names`` active; what is merged and would not be exact with them is unmerged."""
    wanted, merged = adapters.known(names), list(adapters.state.merged)
    if merged and not _exact(adapters, wanted):
        adapters.refuse_two_heads(wanted)
        adapters.unmerge()
        warn(f"adapter {merged[0]!r} was merged, and is unmerged so that {wanted} can be active")
    adapters.activate(wanted, trainable=trainable)


def _exact(adapters: AdapterSet, wanted: Sequence[str]) -> bool:
    """Whether what is merged may stay so while ``wanted`` are active."""
    if not set(adapters.state.merged) <= set(wanted):
        return False
    try:
        for _, layer in adapters.layers():
            layer.check_merge(adapters.state.merged, wanted)
    except PeanutError:
        return False
    return True
