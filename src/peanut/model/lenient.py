"""What scripts for Hugging Face PEFT do that has one sensible meaning: it is done, and one warning says what."""

from __future__ import annotations

from ..errors import warn
from ..protocols import PeftConfig
from .adapters.acting import experts_of
from .adapters.adapter_set import AdapterSet
from .checkpoints.mixtures import name_for

__all__ = ["make_room"]


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
            adapters.add_given(trial, config, meta=True, copies=False)
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
