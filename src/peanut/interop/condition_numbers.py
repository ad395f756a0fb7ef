"""Chooses the layers to adapt by the condition numbers of their weights (KappaTune, arXiv 2506.16289)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import nn

from ..errors import PeanutError, warn
from ..model.targets.paths import bare, inside_attention, kind_name, modules_by_path
from ..weights import FrozenLayer, kind_of

__all__ = ["KappaTuneSelector", "find_kappa_target_modules"]

_EXPERTS = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")


class KappaTuneSelector:
    """The linear layers of a model, those with the smallest κ = σ₁ / σₙ first, σ the singular values of their weight.

    Args:
        max_dim_size_to_analyze: layers with a larger width are left out.
        moe_param_suffixes: how the names of fused experts end, of which a warning says that they are left out.
        show_progress: show a bar while the singular values are computed, once.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.model = model
        self.max_dim_size_to_analyze = max_dim_size_to_analyze
        self.show_progress = show_progress
        self.moe_param_suffixes = tuple(moe_param_suffixes or _EXPERTS)

    @cached_property
    def condition_numbers(self) -> dict[str, float]:
        """κ by the layer's path; infinite where the weight is singular."""
        from transformers.utils.logging import tqdm

        modules = modules_by_path(self.model)
        frozen = {
            path: FrozenLayer(bare(module), kind)
            for path, module in modules.items()
            if kind_name(module) in ("linear", "conv1d") and not inside_attention(path, modules)
            for kind in (kind_of(bare(module)),)
            if kind is not None
        }
        most = self.max_dim_size_to_analyze
        small = {path: own for path, own in frozen.items() if max(own.in_features, own.out_features) <= most}
        shown = tqdm(small.items(), desc="Condition numbers", unit="layer", disable=not self.show_progress)
        found = {path: _condition_number(own) for path, own in shown}
        if experts := self._experts():
            warn(f"{len(experts)} parameters of experts ({experts[0]}) are left out: they cannot be adapted yet")
        return dict(sorted(found.items(), key=lambda each: each[1]))

    def _experts(self) -> Sequence[str]:
        own = self.model.named_parameters()
        return [name for name, value in own if value.dim() == 3 and f".{name}".endswith(self.moe_param_suffixes)]

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """The paths of the first ``num_modules``, else of this share, else of those up to this κ, else of all."""
        paths = list(self.condition_numbers)
        if num_modules is not None:
            return paths[:num_modules]
        if top_p is not None:
            return paths[: max(1, int(len(paths) * top_p))]
        return [path for path in paths if threshold is None or self.condition_numbers[path] <= threshold]

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """None of a model without fused experts.

        Raises:
            PeanutError: it has some: they cannot be adapted yet.
        """
        if experts := self._experts():
            raise PeanutError(f"'{experts[0]}', fused experts", "layers: they cannot be adapted yet", "adapt layers")
        return []


def _condition_number(layer: FrozenLayer) -> float:
    values = torch.linalg.svdvals(layer.matrix().detach().float())
    return float(values[0] / values[-1]) if values[-1] > 0 else math.inf


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """``target_modules`` for a config: this share of the linear layers, those with the smallest condition numbers.

    ``target_parameters`` is ``None``: fused experts are left out, with a warning.
    """
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    return {"target_modules": selector.get_best_targets(top_p=top_p), "target_parameters": None}
