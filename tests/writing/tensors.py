"""Ways to write to one tensor: operators in place, and past autograd."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn

from .target import Way, assign, on, own_memory, set_data

__all__ = ["DATA", "IN_PLACE"]

IN_PLACE: dict[str, Way] = {
    "copy_": on(lambda p, v: p.copy_(v)),
    "assignment to all": on(assign),
    "add_": on(lambda p, v: p.add_(v - p)),
    "sub_": on(lambda p, v: p.sub_(p - v)),
    "lerp_": on(lambda p, v: p.lerp_(v, 1.0)),
    "mul_ and add_": on(lambda p, v: p.mul_(0.5).add_(v - p)),
    "zero_ and addcmul_": on(lambda p, v: p.zero_().addcmul_(v, torch.ones_like(v))),
    "fill_ and out=": on(lambda p, v: torch.add(p.fill_(0), v, out=p)),
    "index_copy_": on(lambda p, v: p.index_copy_(0, torch.arange(len(p)), v)),
    "index_put_": on(lambda p, v: p.index_put_((torch.arange(len(p)),), v)),
    "scatter_": on(lambda p, v: p.scatter_(0, torch.zeros_like(v[:1], dtype=torch.long), v[:1]).copy_(v)),
    "masked_scatter_": on(lambda p, v: p.masked_scatter_(torch.ones_like(v, dtype=torch.bool), v)),
    "put_": on(lambda p, v: p.put_(torch.arange(p.numel()), v.flatten())),
    "copy_ to rows": on(lambda p, v: [row.copy_(value) for row, value in zip(p.unbind(0), v, strict=True)]),
    "copy_ to the transpose": on(lambda p, v: p.mT.copy_(v.mT) if p.dim() > 1 else p.copy_(v)),
    "aten copy_": on(torch.ops.aten.copy_.default),
    "map_": on(lambda p, v: p.detach().map_(v, lambda _, new: new)),
    "set_": on(lambda p, v: p.set_(v.clone())),
    "nn.init.normal_": on(lambda p, _: nn.init.normal_(p, std=0.5)),
    "nn.init.zeros_, then +=": on(lambda p, v: nn.init.zeros_(p).data.__iadd__(v)),
}

# Past autograd and the count of versions


def preserving_version(tensor: Tensor, value: Tensor) -> None:
    with torch.autograd._unsafe_preserve_version_counter(tensor):
        tensor.copy_(value)


def in_inference_mode(tensor: Tensor, value: Tensor) -> None:
    with torch.inference_mode():
        tensor.copy_(value)


def unfrozen(tensor: Tensor, value: Tensor) -> None:
    before = tensor.requires_grad
    tensor.requires_grad_(False)
    with torch.enable_grad():
        tensor.copy_(value)
    tensor.requires_grad_(before)


def memory_moved(tensor: Tensor, value: Tensor) -> None:
    """The data of another tensor in the same memory: freed, and most often given out again."""
    shape = tensor.shape
    tensor.data = tensor.new_empty(0)
    tensor.data = value.clone().reshape(shape)


def emptied_and_filled(tensor: Tensor, value: Tensor) -> None:
    """As sharding does between uses: the storage let go, and of its size again."""
    storage, size = tensor.untyped_storage(), tensor.untyped_storage().nbytes()
    storage.resize_(0)
    storage.resize_(size)
    tensor.data.copy_(value)


def old_idiom(tensor: Tensor, value: Tensor) -> None:
    """p.data -= lr * p.grad.data, the gradient cut to a norm and zeroed in place."""
    if tensor.grad is None:
        tensor.grad = torch.zeros_like(tensor)
    tensor.grad.data.copy_(2 * (tensor - value))
    nn.utils.clip_grad_norm_([tensor], 1e9)
    tensor.data -= 0.5 * tensor.grad.data
    tensor.grad.data.zero_()


def in_a_thread(tensor: Tensor, value: Tensor) -> None:
    thread = threading.Thread(target=lambda: tensor.data.copy_(value))
    thread.start()
    thread.join()


DATA: dict[str, Way] = {
    "data.copy_": on(lambda p, v: p.data.copy_(v)),
    "data +=": on(lambda p, v: p.data.add_(v - p)),
    "data *= and +=": on(lambda p, v: p.data.mul_(2).sub_(2 * p - p - v + p)),
    "data[...] =": on(lambda p, v: assign(p.data, v)),
    "data -= lr grad, zeroed in place": on(old_idiom),
    "data = new": on(set_data),
    "data = new in the old memory": on(memory_moved),
    "detach().copy_": on(lambda p, v: p.detach().copy_(v)),
    "detach().data.view.copy_": on(lambda p, v: p.detach().data.view(-1).copy_(v.reshape(-1))),
    "frozen, copy_ with gradients": on(unfrozen),
    "inference_mode": on(in_inference_mode),
    "version preserved": on(preserving_version),
    "storage emptied and filled": on(emptied_and_filled),
    "storage copy_": on(lambda p, v: own_memory(p).untyped_storage().copy_(v.clone().contiguous().untyped_storage())),
    "in a thread": on(in_a_thread),
}
