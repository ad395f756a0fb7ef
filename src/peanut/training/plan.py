"""``peanut train --dry-run``: steps, parameters and memory of a run, without loading any weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..errors import OutOfReachWarning
from ..model.peft_model import PeftModel, get_peft_model
from ..model.targets.reach import reach_of
from .config import RunConfig
from .model import adapter_config, empty_base, head_names, model_config
from .tasks import Task

__all__ = ["Memory", "Plan", "make_plan", "precision"]


@dataclass(frozen=True)
class Memory:
    """Bytes that training needs.

    Args:
        weights: the frozen weights and the trained parameters.
        gradients: of the trained parameters.
        optimizer: AdamW's two moments.
        activations: what the backward needs of one batch of the longest rows, counted by running the model without
            data; other attention kernels, the allocator and temporaries add to it, so it is an estimate. ``None`` for a
            model that does not run without data, as some with fused experts.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int | None

    @property
    def total(self) -> int:
        """All of it that is known."""
        return self.weights + self.gradients + self.optimizer + (self.activations or 0)


@dataclass(frozen=True)
class Plan:
    """A run before it starts.

    Args:
        config: the run.
        train_rows, eval_rows: rows of data (pieces, where text is packed).
        steps: optimiser steps.
        classes: the classes, for classification.
        modules: paths of the adapted places, "/" for the input.
        heads: paths of the modules trained whole.
        adapter_parameters, head_parameters, all_parameters: how many there are.
        out_of_reach: which share of the weights no adapter reaches, in words; empty where it is negligible.
        memory: what training needs.
    """

    config: RunConfig
    train_rows: int
    eval_rows: int
    steps: int
    classes: list[str]
    modules: list[str]
    heads: list[str]
    adapter_parameters: int
    head_parameters: int
    all_parameters: int
    out_of_reach: str
    memory: Memory


def make_plan(config: RunConfig, task: Task, processor: Any, train_rows: int, eval_rows: int) -> Plan:
    """The plan of a run whose data has been read.

    Args:
        config: the run.
        task: its task, which has learned the classes.
        processor: the tokenizer or image processor.
        train_rows, eval_rows: how many rows there are.
    """
    base = model_config(config.model.path, task, processor, config.model.revision)
    dtype: Any = base.dtype if config.model.dtype == "auto" else getattr(torch, config.model.dtype)
    model = empty_base(task, base, dtype or torch.float32, config.model.path)
    heads = head_names(model) if task.trains_head else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OutOfReachWarning)  # the plan says it
        adapted = get_peft_model(model, adapter_config(config.adapter, task, config.model.path, heads))
    adapters = adapted.adapters
    head = [p for _, saved in adapters.saved_modules() for p in saved.modules_to_save.parameters()]
    trained = [p for p in adapted.parameters() if p.requires_grad]
    training = config.training
    a_step = training.batch_size * training.gradient_accumulation
    steps = training.steps or math.ceil(math.ceil(train_rows / a_step) * training.epochs)
    return Plan(
        config=config,
        train_rows=train_rows,
        eval_rows=eval_rows,
        steps=steps,
        classes=task.labels,
        modules=[place.path for place in adapters.places()],
        heads=[path for path, _ in adapters.saved_modules()],
        adapter_parameters=_count(trained) - _count(head),
        head_parameters=_count(head),
        all_parameters=_count(adapted.parameters()),
        out_of_reach=str(reach_of(model)),
        memory=Memory(
            weights=_size(adapted.parameters()) + _size(adapted.buffers()),
            gradients=_size(trained),
            optimizer=2 * _size(trained),
            activations=_activations(adapted, task.example(base, training.batch_size), config),
        ),
    )


def precision(config: RunConfig) -> torch.dtype | None:
    """The dtype of autocast, if the run asks for one."""
    return None if config.training.precision == "float32" else getattr(torch, config.training.precision)


def _activations(model: PeftModel, batch: dict[str, Tensor], config: RunConfig) -> int | None:
    """Bytes that autograd saves in one forward, beyond parameters and buffers: counted on tensors without storage."""
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []  # a freed tensor's address could be reused
    known: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            sizes[storage._cdata] = storage.nbytes()
            kept.append(tensor)
        return tensor

    # On the meta device itself a model cannot run: autocast, for one, does not know it.
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu").train()
        if config.training.gradient_checkpointing:
            enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        known = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        inputs = {name: torch.empty_like(value, device="cpu") for name, value in batch.items()}
        dtype = precision(config)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", dtype=dtype, enabled=dtype is not None),
        ):
            try:
                model(**inputs)
            except RuntimeError:  # it looks at values, or uses kernels that tensors without storage do not have
                return None
    return sum(sizes.values())


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
