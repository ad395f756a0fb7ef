"""Adds adapters to a model in place (without ``PeftModel``), and reads and writes their state dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from ..absent import without
from ..errors import PeanutError, shown
from ..operators.combining import Majority
from ..protocols import PeftConfig, method_of
from ..protocols.arguments import checked
from .adapters.acting import experts_of
from .adapters.adapter_set import AdapterSet
from .adapters.surgery import SHARED
from .adapters.weighted import Combination, add_weighted
from .checkpoints.base_weights import is_sharded
from .checkpoints.checkpoint import adapter_state, base_state
from .checkpoints.embeddings import SaveEmbeddings, saved_embeddings
from .checkpoints.keys import KeyStyle, file_key, plain_key
from .checkpoints.loading import load_state
from .checkpoints.mixtures import add, name_for
from .checkpoints.shards import load_into_shards, local_parts
from .checkpoints.stored_adapter import StoredAdapter
from .checkpoints.tensor_files import refuse_not_finite
from .checkpoints.ties import without_mirrored
from .layers.shared import Shared
from .targets.matching import target_paths
from .targets.paths import bare, modules_by_path
from .targets.reach import warn_of_unreached
from .tuner import Tuner, prefix_of

__all__ = [
    "AdaptedModel",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "own_config",
    "penalty",
    "set_peft_model_state_dict",
    "targeting",
]


class AdaptedModel(Tuner):
    """A base model (``.model``, changed in place) with adapters in it.

    Args:
        config: the adapter's config, or several by name.
        adapter_name: name of the adapter, if ``config`` is one.
        low_cpu_mem_usage: leave the adapter's parameters without storage, to be filled by loading.
        state_dict: see ``inject_adapter_in_model``.
    """

    method: ClassVar[str | None] = None
    also: ClassVar[str | None] = None
    """Another method that the config class of this one may stand for."""

    def __init__(
        self,
        model: nn.Module,
        config: PeftConfig | Mapping[str, PeftConfig],
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        configs = {adapter_name: config} if isinstance(config, PeftConfig) else dict(config)
        for name, own in configs.items():
            if self.method is not None and own.peft_type not in (self.method, self.also):
                raise PeanutError(
                    f"{type(own).__name__} given to {type(self).__name__}",
                    f"a config of {self.method}",
                    "use get_peft_model, which takes any",
                )
            inject_adapter_in_model(own, model, name, low_cpu_mem_usage, state_dict)
        if len(configs) > 1:
            experts = {expert for own in self.peft_config.values() for expert in experts_of(own)}  # act through those
            self.set_adapter([name for name in configs if name not in experts])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Puts the adapter with the config of that name, ``peft_config[adapter_name]``, into a model.

        Raises:
            PeanutError: there is no such config.
        """
        (name,) = self.adapters.known(adapter_name)
        config = self.peft_config[name]
        inject_adapter_in_model(config, model, name, low_cpu_mem_usage, state_dict, wide=autocast_adapter_dtype)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: Majority = "total",
    ) -> None:
        """Adds a LoRA that combines adapters of any methods (of (IA)³ an (IA)³): ΔW = Σ wᵢ ΔWᵢ, or as named.

        Args:
            combination_type: of the factors: ``linear``, ``ties``, ``dare_linear``, ``dare_ties``, ``magnitude_prune``;
                of the changes ΔWᵢ, cut to the rank: ``svd`` and these with ``_svd``; exact sums, of all ranks
                together: ``cat``, ``task_arithmetic`` (cut if svd_rank is given), ``slerp`` of two.
            svd_rank: the rank; by default the largest of the adapters'.
            svd_clamp: factors are clamped to this quantile of their entries.
            density: the share of the entries that pruning leaves.
            majority_sign_method: whether signs are elected by their sum or by their number.

        Raises:
            PeanutError: an adapter is unknown or does not fit, or there is not one weight for each.
        """
        how = Combination(
            combination_type, svd_rank, svd_clamp, svd_full_matrices, svd_driver, density, majority_sign_method
        )
        add_weighted(self.adapters, adapters, weights, adapter_name, how)

    def __getattr__(self, name: str) -> Any:
        if name == "prefix":  # as a property it would lose why there is none
            return prefix_of(self.adapters)
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or name.startswith("__"):  # how the wrapper itself is copied
                raise
            if (missing := without(self, name)) is not None:
                raise missing from None
            try:
                return getattr(self.model, name)
            except AttributeError:
                banks = {own: bank for place in self.adapters.places() for own, bank in place.banks.items()}
                if shared := Shared(banks, name):
                    return shared
                raise


@checked
def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
    *,
    wide: bool = True,
) -> nn.Module:
    """Puts an adapter into a model, freezes the rest, and returns the model itself.

    Args:
        peft_config: a config; where adapters are already, also one of Hugging Face PEFT's, as diffusers makes it.
        low_cpu_mem_usage: leave the adapter's parameters without storage, to be filled by loading.
        state_dict: tensors by the keys that a file has: exactly the layers that they belong to are adapted, whatever
            ``target_modules`` says. Their values are not used: ``set_peft_model_state_dict`` copies them.
        wide: store parameters in float32 at least, also on a half-precision base.
    """
    adapters = _present(model)
    base = adapters.model
    if adapters.configs:
        peft_config = own_config(peft_config)
    if state_dict is not None:
        peft_config = targeting(base, peft_config, state_dict)
    adapter_name = name_for(adapters, peft_config, adapter_name)
    peft_config = add(adapters, adapter_name, peft_config, meta=low_cpu_mem_usage, wide=wide)
    base.__dict__.setdefault("peft_config", {})[adapter_name] = peft_config
    base.requires_grad_(False)
    adapters.activate(adapter_name, trainable=not peft_config.inference_mode)
    warn_of_unreached(base, peft_config)
    return model


def _present(model: nn.Module) -> AdapterSet:
    """The set of adapters of a model; a new one where somebody has put the base's own layers back by hand."""
    adapters = AdapterSet.of(model)
    changing = any(not config.prompts for config in adapters.configs.values())
    if changing and next(adapters.places(), None) is None and next(adapters.saved_modules(), None) is None:
        adapters.leave()
        return AdapterSet.of(model)
    return adapters


def own_config(config: Any) -> PeftConfig:
    """A config of ours for one of Hugging Face PEFT's; what is none stays as it is."""
    if isinstance(config, PeftConfig) or not hasattr(config, "to_dict"):
        return config  # type: ignore[no-any-return]
    return PeftConfig.from_dict(config.to_dict(), "the config")


def targeting(model: nn.Module, config: PeftConfig, state_dict: Mapping[str, Tensor]) -> PeftConfig:
    """A config whose targets are the layers that tensors belong to, by the keys that a file gives them.

    Raises:
        PeanutError: none of them belongs to a layer of the model.
    """
    modules, style = modules_by_path(model), KeyStyle.of(config)
    found: set[str] = set()
    for key in state_dict:
        parts = plain_key(key, style).split(".")
        path = next(
            (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1) if ".".join(parts[:end]) in modules), ""
        )
        if path and parts[path.count(".") + 1] not in bare(modules[path])._parameters:  # else it is trained whole
            found.add(path)
    if not found:
        raise PeanutError(
            f"a state dict with {shown(next(iter(state_dict), 'no keys'))}, of no layer of {type(model).__name__}",
            "the keys that the adapter's file has",
            "leave state_dict out, or give that of this model",
        )
    given = None if config.target_modules is None else set(target_paths(model, config, method_of(config.peft_type)))
    return config if given == found else replace(config, target_modules=sorted(found), exclude_modules=None)


def penalty(model: nn.Module) -> Tensor | None:
    """What the active adapters add to the loss in training, for a model that returns no loss; else it is in it."""
    return AdapterSet.of(model).penalty()


@checked
def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: SaveEmbeddings = "auto",
) -> dict[str, Tensor]:
    """An adapter's tensors by the keys that files give them.

    Args:
        model: a ``PeftModel``, or a model with injected adapters (the keys then have no prefix).
        state_dict: full state dict of the model to take the values from; of one around which FSDP's first version is,
            that which its ``state_dict()`` gives.
        unwrap_compiled: accepted for scripts: keys never name what torch.compile puts around a model.
        save_embedding_layers: see ``PeftModel.save_pretrained``.
    """
    adapters = AdapterSet.of(model)
    if state_dict is None and is_sharded(model):
        state_dict = model.state_dict()  # all processes have to call it; some are given nothing
        if not state_dict:
            return {}
    config, state = adapter_state(adapters, adapter_name, state_dict)
    state |= saved_embeddings(adapters, adapter_name, save_embedding_layers, base_state(state_dict))
    wrapped = isinstance(getattr(model, "base_model", None), AdaptedModel)
    style = KeyStyle.of(config) if wrapped else KeyStyle("", "")
    return {file_key(key, style): value for key, value in state.items()}


@checked
def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
    strict: bool = True,
) -> _IncompatibleKeys:
    """Copies tensors, by the keys that files give them, into an adapter.

    Args:
        ignore_mismatched_sizes: warn of a tensor of another shape and leave what is there; its key is then missing.
        low_cpu_mem_usage: where a parameter has no storage yet, put the tensor itself in its place.
        strict: refuse keys that are missing or unexpected; else warn of them, and leave what is there.

    Raises:
        PeanutError: a key is missing or unexpected, a shape or kind differs, or a value is not finite. Nothing is
            then copied.
    """
    adapters = AdapterSet.of(model)
    adapters.known(adapter_name)
    shared = [key.removeprefix(SHARED) for key, _ in adapters.parameters(adapter_name) if key.startswith(SHARED)]
    style = KeyStyle.of(adapters.configs[adapter_name])
    refuse_not_finite(local_parts(peft_model_state_dict), "the state dict", "leave it out, or train again")
    state = {plain_key(key, style, shared): value for key, value in peft_model_state_dict.items()}
    if is_sharded(model):
        if ignore_mismatched_sizes:
            raise PeanutError("ignore_mismatched_sizes=True for a model in FSDP", "sizes that fit", "load before FSDP")
        state = without_mirrored(adapters, adapter_name, state, "the state dict")
        return load_into_shards(model, adapters, adapter_name, state, strict)
    stored = StoredAdapter(adapters.configs[adapter_name], state, None, "the state dict")
    return load_state(
        adapters,
        adapter_name,
        stored,
        check=False,
        alias=low_cpu_mem_usage,
        skip_sizes=ignore_mismatched_sizes,
        strict=strict,
    )
