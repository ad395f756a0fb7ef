"""The adapters of one model: add, activate, merge, delete."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PeanutError, warn
from ...protocols import Method, PeftConfig, method_of
from ...weights import fix_storage
from ..layers.adapted import Adapted, walk
from ..layers.hooks import hook, unhook
from ..layers.mirrored import Mirrored
from ..layers.parameters import Parameters
from ..layers.saved_modules import SavedModule
from ..layers.state import AdapterState
from ..prompts.running import Runner
from ..targets.architectures import architecture_of
from ..targets.matching import saved_paths
from ..targets.ties import warn_of_ties
from .acting import Acting, experts_of
from .adding import put
from .aliases import warn_of_aliases
from .merging import changes
from .size_limits import limit_for
from .starting import New
from .surgery import SHARED, key_of
from .training_hooks import follow, unfollow

__all__ = ["AdapterSet"]


class AdapterSet(Acting):
    """The adapters of ``model``, whose target layers are wrapped in place; ``AdapterSet.of`` finds them again."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.runner = Runner(model, self.state)
        model.__dict__["_adapter_set"] = self

    @staticmethod
    def of(model: nn.Module) -> AdapterSet:
        """The set of adapters of a model (of its base model, if it is wrapped); a new one if it has none.

        What torch.compile puts around a model has none of its own: paths and keys never name it.
        """
        model = model._modules.get("_orig_mod") or model
        # A wrapper (PeftModel, PeanutModel) knows the set of the model that it wraps.
        found = model.__dict__.get("_adapter_set") or getattr(model, "adapters", None)
        return found if isinstance(found, AdapterSet) else AdapterSet(model)

    # What there is

    def parameters(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """The tensors of adapter ``name`` in its places and trained modules, by the key that files give them."""
        shared: dict[str, Tensor] = {}
        whole: list[SavedModule] = []
        for module in walk(self.model):
            if isinstance(module, Adapted) and name in module.adapters:
                own = module.adapters[name]
                for suffix, value in () if isinstance(own, Mirrored) else own.values_by_suffix().items():
                    yield key_of(module.path, suffix), value
                if name in module.banks:
                    shared = module.banks[name].values_by_suffix()
            elif isinstance(module, SavedModule) and name in module.modules_to_save:
                whole.append(module)
        for suffix, value in shared.items():
            yield key_of(SHARED, suffix), value
        for saved in whole:
            for suffix, value in saved.modules_to_save[name].state_dict(keep_vars=True).items():
                yield key_of(saved.path, suffix), value

    def bank(self, name: str) -> Parameters | None:
        """The tensors that the layers of adapter ``name`` share, if they do; the first of the layers holds them."""
        return next((place.banks[name] for place in self.places(name) if name in place.banks), None)

    def penalty(self) -> Tensor | None:
        """What the active adapters' methods add to the loss in training, or ``None``."""
        total: Tensor | None = None
        for name in self.state.active:
            method = self.method(name)
            values = self._values(name, method) if overrides(method, "penalty") else []
            own = method.penalty(self.configs[name], values) if values else None
            if own is not None:
                total = own if total is None else total + own.to(total.device)
        return total

    def plan(self, steps: int, rows: int) -> None:
        """Tells the active adapters' methods how long training will be."""
        for name in self.state.active:
            config = self.configs[name]
            planned = method_of(config.peft_type).planned(config, steps, rows)
            if planned is not config:
                self.configure(name, planned)

    @torch.no_grad()
    def after_step(self, updated: Collection[int]) -> None:
        """Runs methods' ``after_step`` after an optimizer has updated the parameters of these ids."""
        for name in self.trained:
            method = self.method(name)
            values = self._values(name, method) if overrides(method, "after_step") else []
            if any(id(value) in updated for own in values for value in own.values()):
                method.after_step(self.configs[name], values)

    def _values(self, name: str, method: Method[Any]) -> list[dict[str, Tensor]]:
        """The tensors of adapter ``name`` in each place where ``method``, not a companion of it, acts."""
        return [
            place.values(name)
            for place in self.places(name)
            if place.method_of(name)[0] == method and not isinstance(place.adapters[name], Mirrored)
        ]

    # In and out

    @changes
    def add(self, name: str, config: PeftConfig, *, meta: bool = False, wide: bool = True, copies: bool = True) -> None:
        """Puts a new adapter into the model; it is neither active nor trained yet.

        Args:
            name: any name without a dot or slash.
            meta: leave the parameters without storage, to be filled by loading.
            wide: store parameters in float32 at least, also on a half-precision base.
            copies: copy the modules that are trained whole; else the caller puts them into ``saved_modules``.

        Raises:
            PeanutError: the name is taken or unusable, or the config does not fit the model, which is then unchanged.
        """
        if not name or any(character in name for character in "./\\") or name == "__base__":
            raise PeanutError(f"adapter name {name!r}", "a name without dots and slashes", "choose another name")
        if name in self.configs:
            raise PeanutError(
                f"an adapter {name!r} is there already", "a new name", "delete it first or choose another"
            )
        if self.state.merged:
            raise PeanutError(
                f"adapter {self.state.merged[0]!r} is merged", "an unmerged model", "call unmerge_adapter() first"
            )
        if any(place.state is not self.state for place in self.places()):
            raise PeanutError(
                f"a part of this {type(self.model).__name__}, or a model around it, has adapters of its own",
                "one model that holds all adapters",
                "add the adapter there, or unload() that one first",
            )
        method, given = method_of(config.peft_type), config
        config.check_given()
        config = method.completed(config, architecture_of(self.model))
        fix_storage(self.model)
        self.find_elsewhere()
        heads = saved_paths(self.model, config)
        for path in heads:
            self.check_whole(path)
        try:
            seed = str(int(torch.randint(2**62, (), device="cpu").item()))
            new = New(name, seed, meta, wide, limit_for(self.model, name))
            config = put(self, new, method, config, given)
            warn_of_ties(self.model, config, [*heads, *(place.path for place in self.places(name))])
            memo: dict[int, Any] = {}
            if heads:
                warn_of_aliases(self.model, self.inside(heads))
            for path in heads:
                if copies:
                    self.saved(path).add(name, wide=wide, memo=memo)
                else:
                    self.saved(path).modules_to_save[name] = nn.Module()
        except BaseException:
            self._take_out(name)
            raise
        self.configs[name] = config
        hook(self.model, self.state.begin, before=True)
        hook(self.model, self.state.end)
        self.freeze(self.trained)
        self.runner.watch()
        if overrides(method, "penalty") or overrides(method, "after_step"):
            follow(self)

    def add_given(self, name: str, config: PeftConfig, *, meta: bool = False, copies: bool = True) -> None:
        """``add`` of an adapter whose tensors are given afterwards.

        The global random state stays as it was, and so does which parameters are trained, also where that was set by
        hand.
        """
        trained = [(own, own.requires_grad) for own in self.model.parameters()]
        with torch.random.fork_rng(devices=[]):
            self.add(name, config, meta=meta, copies=copies)
        for own, before in trained:
            own.requires_grad_(before)

    @changes
    def configure(self, name: str, config: PeftConfig) -> None:
        """Gives adapter ``name`` another config of its method: the one that its parameters were trained with."""
        method = method_of(config.peft_type)
        for place in self.places(name):
            if place.method_of(name)[0] == method:
                place.configure(name, config.for_layer(place.path))
        self.configs[name] = config
        if name in (injected := self.model.__dict__.get("peft_config", {})):
            injected[name] = config

    @changes
    def delete(self, name: str, *, unwrap: bool = True) -> None:
        """Takes an adapter out; if it alone was active, the first left becomes so, trained if this one was.

        Args:
            unwrap: put the base's own modules back where no adapter is left.
        """
        alone, trained = self.state.active == [name], name in self.trained
        self._delete(name, unwrap=unwrap)
        mixed = {expert for config in self.configs.values() for expert in experts_of(config)}
        left = [other for other in self.configs if other not in mixed]
        if alone and left:
            self.activate(left[0], trainable=trained)
            warn(f"adapter {name!r}, which is deleted, was active; {left[0]!r} is active now")

    def _delete(self, name: str, *, unwrap: bool = True) -> None:
        self.known(name)
        if name in self.state.merged:
            raise PeanutError(f"adapter {name!r} is merged", "an unmerged adapter", "call unmerge_adapter() first")
        mixed = [other for other, config in self.configs.items() if name in experts_of(config)]
        if mixed:
            raise PeanutError(
                f"adapter {name!r} is an expert of {mixed[0]!r}",
                "an adapter that stands alone",
                f"delete {mixed[0]!r} first",
            )
        self._take_out(name, unwrap=unwrap)
        del self.configs[name]
        if unwrap:  # else whoever takes it out of the layers one by one does this too
            self.model.__dict__.get("peft_config", {}).pop(name, None)
        self.state.active = [other for other in self.state.active if other != name]
        left = {place.path for place in self.places() if place.adapters}
        left |= {path for path, saved in self.saved_modules() if len(saved.modules_to_save)}
        self.state.off &= left
        local = {path: ([each for each in own if each != name], on) for path, (own, on) in self.state.local.items()}
        self.state.local = {path: own for path, own in local.items() if own[0] and path in left}
        self.trained = [other for other in self.trained if other != name]
        self.runner.watch()
        if not self.configs:
            unhook(self.model, self.state)

    def _take_out(self, name: str, *, unwrap: bool = True) -> None:
        """Takes what there is of an adapter out of the model's modules."""
        for place in list(self.places(name)):
            place.delete(name)
        for _, saved in list(self.saved_modules(name)):
            saved.delete(name)
        if unwrap:
            self._unwrap()

    def _unwrap(self) -> None:
        """Puts the base's own modules back where no adapter is left."""
        for place in list(self.places()):
            if not len(place.adapters):
                self.emptied(place)
        for path, saved in list(self.saved_modules()):
            if not len(saved.modules_to_save):
                self.put(path, saved.original_module)

    @changes
    def unload(self) -> nn.Module:
        """The base model without adapters, as it was (what is merged stays only after ``adopt``)."""
        self.unmerge()
        for name in sorted(self.configs, key=lambda name: not experts_of(self.configs[name])):  # mixtures first
            self._delete(name)
        self._unwrap()
        self.leave()
        return self.model

    @changes
    def adopt(self, names: Sequence[str] | None = None) -> nn.Module:
        """The base model with adapters merged for good and the active adapters' heads put in place."""
        if self.state.off or not self.state.enabled:
            where = f" at '{min(self.state.off)}'" if self.state.enabled else ""
            warn(f"adapters that are switched off{where} are merged too")
        self.merge(names, alone=True)
        self._tie_again()
        for path, layer in list(self.layers()):
            layer.frozen.forget()
            self.put(path, layer.base_layer)
        for path, saved in list(self.saved_modules()):
            self.put(path, saved.adopted())
        self._untie()
        for place in list(self.places()):
            self.emptied(place)
        self.leave()
        self.configs, self.state, self.trained, self._resting = {}, AdapterState(), [], None
        return self.model

    # Leaving

    def leave(self) -> None:
        """Leaves no trace of the adapters on the model."""
        self.runner.leave()
        unhook(self.model, self.state)
        unfollow(self)
        self.model.__dict__.pop("_adapter_set", None)
        self.forget_configs()

    def forget_configs(self) -> None:
        """Takes the configs that injecting put on the model off it; those of another library stay."""
        if all(isinstance(config, PeftConfig) for config in self.model.__dict__.get("peft_config", {}).values()):
            self.model.__dict__.pop("peft_config", None)


def overrides(method: Method[Any], name: str) -> bool:
    """Whether a method has its own version of an optional part of the protocol."""
    return getattr(type(method), name) is not getattr(Method, name)
