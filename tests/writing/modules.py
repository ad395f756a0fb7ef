"""Ways to put another tensor in the place of one, and to load, convert or average modules as a whole."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .target import Slot, Target, Values, Way, Write, each, replaced

__all__ = ["MODULES", "PLACE"]


def deleted_and_set(slot: Slot, value: Tensor) -> None:
    new = replaced(slot, value)
    delattr(slot.owner, slot.name)
    if isinstance(new, nn.Parameter):
        setattr(slot.owner, slot.name, new)
    else:
        slot.owner.register_buffer(slot.name, new)


def put_in_table(slot: Slot, value: Tensor) -> None:
    table = slot.owner._parameters if isinstance(slot.tensor, nn.Parameter) else slot.owner._buffers
    table[slot.name] = replaced(slot, value)  # type: ignore[assignment]


PLACE: dict[str, Way] = {
    "setattr": each(lambda slot, v: setattr(slot.owner, slot.name, replaced(slot, v))),
    "delattr and setattr": each(deleted_and_set),
    "_parameters[name] =": each(put_in_table),
    "swap_tensors": each(lambda slot, v: torch.utils.swap_tensors(slot.tensor, replaced(slot, v))),
    "accelerate's set_module_tensor_to_device": each(
        lambda slot, v: set_module_tensor_to_device(slot.owner, slot.name, "cpu", value=v)
    ),
}

# Modules as a whole


def module_loaded(assign_: bool, future: bool = False) -> Way:
    def way(target: Target) -> Write:
        def write(values: Values) -> None:
            before = torch.__future__.get_swap_module_params_on_conversion()
            torch.__future__.set_swap_module_params_on_conversion(future)
            try:
                for owner, own in target.by_owner(values):
                    state = {name: value.detach().clone() for name, value in own.items()}
                    owner.load_state_dict(state, assign=assign_)
            finally:
                torch.__future__.set_swap_module_params_on_conversion(before)

        return write

    return way


def model_loaded(target: Target) -> Write:
    def write(values: Values) -> None:
        state = {key: value.clone() for key, value in target.model.state_dict().items()}
        for slot, value in zip(target.slots, values, strict=True):
            assert slot.key in state
            state[slot.key] = value
        target.model.load_state_dict(state)

    return write


def file_loaded(target: Target) -> Write:
    def write(values: Values) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "x.safetensors"
            for owner, own in target.by_owner(values):
                safetensors.torch.save_file({name: v.detach().clone() for name, v in own.items()}, path)
                safetensors.torch.load_model(owner, path)

    return write


def torch_file_loaded(target: Target) -> Write:
    def write(values: Values) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for number, (owner, own) in enumerate(target.by_owner(values)):
                path = Path(folder) / f"{number}.pt"  # each file is read as long as the tensors are there
                torch.save({name: value.detach().clone() for name, value in own.items()}, path)
                owner.load_state_dict(torch.load(path, mmap=True, weights_only=True), assign=True)

    return write


def moved(*moves: Callable[[nn.Module], Any], first: bool = True) -> Way:
    """A way that writes and converts modules, there and back; ``first``: it writes before."""

    def way(target: Target) -> Write:
        @torch.no_grad()
        def write(values: Values) -> None:
            for step in range(2):
                if (step == 0) == first:
                    for slot, value in zip(target.slots, values, strict=True):
                        slot.tensor.data.copy_(value)
                else:
                    for owner, _ in target.by_owner(values):
                        for move in moves:
                            move(owner)

        return write

    return way


def emptied(module: nn.Module) -> None:
    """``to_empty``, with the buffers as they were."""
    kept = [buffer.clone() for buffer in module.buffers()]
    module.to_empty(device="cpu")
    for buffer, value in zip(module.buffers(), kept, strict=True):
        buffer.copy_(value)


def applied(target: Target) -> Write:
    """``Module._apply``, which every move of a module goes through."""

    def write(values: Values) -> None:
        new = {id(slot.tensor): value for slot, value in zip(target.slots, values, strict=True)}
        for owner, _ in target.by_owner(values):
            owner._apply(lambda tensor: new.get(id(tensor), tensor).detach().clone())

    return write


def averaged(target: Target) -> Write:
    """An exponential moving average of the model, copied into it."""
    mean = AveragedModel(target.model)
    theirs = dict(mean.module.named_parameters()) | dict(mean.module.named_buffers())

    def write(values: Values) -> None:
        for slot, value in zip(target.slots, values, strict=True):
            theirs[slot.key].data.copy_(value)
            slot.tensor.data.copy_(theirs[slot.key].data)

    return write


MODULES: dict[str, Way] = {
    "load_state_dict of the module": module_loaded(assign_=False),
    "load_state_dict, assign": module_loaded(assign_=True),
    "load_state_dict, swapping": module_loaded(assign_=False, future=True),
    "load_state_dict of the model": model_loaded,
    "safetensors' load_model": file_loaded,
    "torch.load, mapped and assigned": torch_file_loaded,
    "half() and back": moved(nn.Module.half, nn.Module.double),
    "float() and back, then written": moved(nn.Module.float, nn.Module.double, first=False),
    "to(bfloat16) and back": moved(lambda m: m.to(torch.bfloat16), lambda m: m.to(torch.float64)),
    "to_empty, then written": moved(emptied, first=False),
    "_apply": applied,
    "average copied in": averaged,
}
if torch.cuda.is_available():
    MODULES["to a device and back"] = moved(nn.Module.cuda, nn.Module.cpu)
