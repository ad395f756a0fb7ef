"""Replaces modules of a model; modes are kept, and everything is restored if it fails."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["as_before", "modes_of", "only_whole"]


def modes_of(base: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Which modules are in training."""
    return [(module, module.training) for module in base.modules()]


def as_before(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    """Restores each module's mode, which making the wrappers has changed."""
    for module, training in modes:
        module.__dict__["training"] = training


@contextmanager
def only_whole(model: nn.Module) -> Iterator[None]:
    """Within the context modules are exchanged; if that fails, every module is put back as it was.

    That is its submodules, parameters, hooks, mode and what is trained; no tensor is copied. Either way the state of
    torch's random number generator is kept, so that training goes on as it would have.
    """
    modules = [(module, dict(module.__dict__)) for module in model.modules()]
    inner = [(value, dict(value)) for _, own in modules for value in own.values() if isinstance(value, dict)]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    except BaseException:
        for module, own in modules:
            module.__dict__.clear()
            module.__dict__.update(own)
        for value, entries in inner:
            value.clear()
            value.update(entries)
        for parameter, was in trained:
            parameter.requires_grad_(was)
        raise
