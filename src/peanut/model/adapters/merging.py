"""``Merging``: writes adapters into the weights of a model's layers, and takes them out again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from ...errors import PeanutError, warn
from ...protocols import WeightMethod
from ...weights.memory import span
from ...weights.stored import same_tensor
from ..layers.hooks import has_hooks
from ..layers.layer import AdaptedLayer
from .surgery import Surgery

__all__ = ["Merging", "changes"]

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound=Surgery)


def changes(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method that changes the adapters: calls that other threads make meanwhile are errors, not wrong outputs."""

    @wraps(method)
    def changing(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.state.changing():
            return method(self, *args, **kwargs)

    return changing


class Merging(Surgery):
    """The adapters of a model that are merged, and what becomes of weights that layers share."""

    def mergeable(self, names: str | Sequence[str]) -> list[str]:
        """``names`` as a list.

        Raises:
            PeanutError: one of them is no change of a weight.
        """
        wanted = self.known(names)
        for name in wanted:
            if not isinstance(self.method(name), WeightMethod):
                raise PeanutError(
                    f"adapter {name!r}, of {self.method(name).name}, changes no weight, so it cannot be merged",
                    "adapters that change weights",
                    "name those, or unload() to leave it out",
                )
        return wanted

    @changes
    def merge(self, names: str | Sequence[str] | None = None, *, alone: bool = False) -> None:
        """Writes the changes of ``names`` (default: the active adapters) into the weights; the others stay as they are.

        Args:
            alone: only they, and what is merged already, are active afterwards.

        Raises:
            PeanutError: a merged weight would not be finite, a bias has nowhere to go, two adapters have a copy of one
                head, or the unmerged ones could not do the rest exactly. Nothing is then merged.
        """
        self.refuse_differing()
        wanted = self.mergeable(self.state.active if names is None else names)
        before = list(self.state.merged)
        if wanted and not alone and set(wanted) <= set(before):
            warn(f"adapter {wanted[0]!r} is merged already: it is written again, as it is now")
        active = list(dict.fromkeys([*(() if alone else self.state.active), *before, *wanted]))
        merged = list(dict.fromkeys([*before, *wanted]))
        self.refuse_two_heads(active)
        for _, layer in self.layers():
            layer.check_merge(merged, active)
        sharing = _sharing_memory(self.model)
        _warn_of_hooks([layer for _, layer in self.layers() if any(name in layer.adapters for name in merged)])

        def shared(layer: AdaptedLayer) -> list[str]:
            return [name for name in ("weight", "bias") if id(layer.frozen.module._parameters.get(name)) in sharing]

        there = [(layer, layer.written) for _, layer in self.layers()]
        try:
            for layer, _ in there:
                layer.write([name for name in active if name in merged], shared=shared(layer))
        except BaseException:
            for layer, written in there:
                layer.restore()
                layer.written = written
                layer.write([name for name in active if name in written], shared=shared(layer))
            raise
        self.state.merged, self.state.active = merged, active

    def refuse_differing(self) -> None:
        """Refuses what is of the whole model while adapters are active in some of its layers alone."""
        for path in self.state.local:
            raise PeanutError(
                f"'{path}' with other active adapters ({self.state.active_at(path)}) than the model",
                "the same in all layers",
                "call set_adapter of the model",
            )

    @changes
    def unmerge(self) -> None:
        """Restores every weight bit for bit; the adapters stay active."""
        for _, layer in self.layers():
            layer.restore()
        self.state.merged = []

    @changes
    def merge_layer(self, layer: AdaptedLayer, names: Sequence[str] | None) -> None:
        """Writes the changes of ``names`` (default: the active adapters) into the weight of one layer alone."""
        wanted = [
            name for name in self.mergeable(self.state.active if names is None else names) if name in layer.adapters
        ]
        if all(name in layer.written for name in wanted):
            return
        active = list(dict.fromkeys([*self.state.active, *wanted]))
        if active != self.state.active:
            self.refuse_two_heads(active)
        written = [name for name in active if name in layer.written or name in wanted]
        layer.check_merge(written, active)
        _warn_of_hooks([layer])
        layer.write(written, shared=("weight", "bias"))  # who else has them is not looked for in each of many layers
        self.state.merged = list(dict.fromkeys([*self.state.merged, *written]))
        self.state.active = active

    @changes
    def unmerge_layer(self, layer: AdaptedLayer) -> None:
        """Restores the weight of one layer bit for bit."""
        layer.restore()
        self.state.merged = [
            name for name in self.state.merged if any(name in other.written for _, other in self.layers())
        ]

    def _tie_again(self) -> None:
        """Gives merged layers that had shared one weight one weight again, if they still agree in every bit.

        Or but for rounding, as the tensors of their adapters are the same.
        """
        apart: dict[int, list[AdaptedLayer]] = {}
        for _, layer in self.layers():
            if layer.frozen.untied_from is not None:
                apart.setdefault(id(layer.frozen.untied_from), []).append(layer)
        for first, *others in apart.values():
            left = any(p is first.frozen.untied_from for p in self.model.parameters())
            weight = first.frozen.module.weight
            if others and not left and all(_agree(first, layer, weight) for layer in others):
                for layer in others:
                    layer.frozen.module.weight = weight

    def _untie(self) -> None:
        """Makes a model that saves right of one in which tensors that transformers ties differ now.

        Of tensors that still share one, transformers writes the first, and would tie the others to the changed one:
        they get tensors of their own. Others than transformers (servers) tie the head by the config's word, so that
        changes; not where an encoder has a decoder, as UMT5 and Switch scale their output by that word.
        """
        named, config = dict(self.model.named_parameters(remove_duplicate=False)), getattr(self.model, "config", None)
        ties: dict[str, str] = getattr(self.model, "all_tied_weights_keys", None) or {}
        ties = {target: source for target, source in ties.items() if target in named and source in named}
        apart = {source for target, source in ties.items() if not self._still_tied(target, source)}
        seen = {id(named[source]): source for source in apart}
        for target, source in ties.items():
            own = named[target]
            if source in apart and seen.setdefault(id(own), target) != target:
                module, _, leaf = target.rpartition(".")
                setattr(self.model.get_submodule(module), leaf, nn.Parameter(own.detach().clone(), own.requires_grad))
        if apart and config is not None and not getattr(config, "is_encoder_decoder", False):
            config.tie_word_embeddings = False

    def _still_tied(self, target: str, source: str) -> bool:
        """Whether two parameters are one still, also while they are offloaded."""
        (one, name), (other, same) = ((path.rpartition(".")[0], path.rpartition(".")[2]) for path in (target, source))
        return name == same and same_tensor(self.model.get_submodule(one), self.model.get_submodule(other), name)

    def refuse_two_heads(self, names: Sequence[str]) -> None:
        for path, saved in self.saved_modules():
            both = [name for name in names if name in saved.modules_to_save]
            if len(both) > 1:
                raise PeanutError(
                    f"adapters {both[0]!r} and {both[1]!r} each have a trained copy of '{path}'",
                    "one such adapter at a time",
                    "activate one of them",
                )


def _agree(first: AdaptedLayer, layer: AdaptedLayer, weight: Tensor) -> bool:
    """Whether two merged layers have one weight."""
    sets = [
        {
            name: (id(getattr(own, "source", own)), each.scaling[name])
            for name, own in each.adapters.items()
            if name in each.written
        }
        for each in (first, layer)
    ]
    return sets[0] == sets[1] or torch.equal(weight, layer.frozen.module.weight)


def _warn_of_hooks(layers: Sequence[AdaptedLayer]) -> None:
    hooked = [layer.path for layer in layers if has_hooks(layer.base_layer)]
    if hooked:
        more = f" (and {len(hooked) - 1} more)" if len(hooked) > 1 else ""
        warn(
            f"hooks were put on '{hooked[0]}.base_layer', not on '{hooked[0]}'{more}: while adapters are merged they "
            "see what is computed with the merged weight",
        )


def _sharing_memory(model: nn.Module) -> set[int]:
    """Identities of the tensors whose memory is not theirs alone.

    Another module holds them (a head tied to the embedding), another tensor lies there (``head.weight.data =
    embedding.weight.data``, a view), or their own elements lie upon each other (``expand``).
    """
    held = [
        (*_place(tensor), id(tensor))
        for module in model.modules()
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None and not getattr(tensor, "_is_flat_param", False)  # FSDP's, of which layers have views
    ]
    found, there, end, last = {place[-1] for place in held if place[-2]}, "", 0, 0
    for device, start, stop, _, tensor in sorted(held):
        if device == there and start < end:
            found |= {tensor, last}
        if device != there or stop > end:
            there, end, last = device, stop, tensor
    return found


def _place(tensor: Tensor) -> tuple[str, int, int, bool]:
    """Where a tensor lies: device, first byte, the one after its last, and whether some of its elements are one."""
    place = span(tensor)
    if place is None:
        return "", id(tensor), id(tensor) + 1, False
    return *place, tensor.nbytes > place[2] - place[1]
