"""Ways that are no writing at all (calls with other values), and those that know adapters."""

from __future__ import annotations

import tempfile

import numpy as np
import torch
from torch import Tensor

from peanut import get_peft_model_state_dict, set_peft_model_state_dict

from .target import Target, Values, Way, Write

__all__ = ["ADAPTERS", "CALLS"]


def called_with(fresh: bool) -> Way:
    """``torch.func.functional_call``: with tensors of its own each time, or always in the same memory."""

    def way(target: Target) -> Write:
        kept = {slot.key: slot.tensor.detach().clone() for slot in target.slots}
        needs = {slot.key: slot.tensor.requires_grad for slot in target.slots}

        def write(values: Values) -> dict[str, Tensor]:
            for slot, value in zip(target.slots, values, strict=True):
                if fresh:
                    kept[slot.key] = value.clone()
                else:
                    np.copyto(kept[slot.key].numpy(), value.numpy())
            given = {key: value if fresh else torch.from_numpy(value.numpy()) for key, value in kept.items()}
            return {key: value.requires_grad_(needs[key]) for key, value in given.items()}

        return write

    return way


CALLS: dict[str, Way] = {
    "functional_call": called_with(fresh=True),
    "functional_call, one memory": called_with(fresh=False),
}

# Of adapters alone


def state_given(target: Target) -> Write:
    def write(values: Values) -> None:
        donor = target.anew({slot.key: value for slot, value in zip(target.slots, values, strict=True)})
        set_peft_model_state_dict(target.model, get_peft_model_state_dict(donor))

    return write


def adapter_loaded(low_cpu_mem_usage: bool) -> Way:
    def way(target: Target) -> Write:
        def write(values: Values) -> None:
            donor = target.anew({slot.key: value for slot, value in zip(target.slots, values, strict=True)})
            with tempfile.TemporaryDirectory() as folder:
                donor.save_pretrained(folder)
                target.model.load_adapter(
                    folder, "default", check_base=False, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True
                )

        return write

    return way


def in_the_backward(target: Target) -> Write:
    """An optimizer in the backward: a hook that writes as soon as a gradient is there."""

    def write(values: Values) -> None:
        for tensor, value in zip(target.tensors(), values, strict=True):
            before, tensor.grad = tensor.grad, None

            def hook(own: Tensor, value: Tensor = value) -> None:
                own.data.copy_(value)

            handle = tensor.register_post_accumulate_grad_hook(hook)
            (tensor * 0).sum().backward()
            handle.remove()
            tensor.grad = before

    return write


ADAPTERS: dict[str, Way] = {
    "set_peft_model_state_dict": state_given,
    "load_adapter": adapter_loaded(False),
    "load_adapter, file's memory": adapter_loaded(True),
    "hook in the backward": in_the_backward,
}
