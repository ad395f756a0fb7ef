"""Poly: each task mixes shared low-rank skills (Ponti et al. 2022, arXiv 2202.13914; heads: Caccia et al. 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import PeanutError
from ..operators import LowRank
from ..operators.per_sample import PerSample
from ..protocols import Change, PeftConfig, Values, WeightMethod, register
from ..protocols.values import Count
from ..weights import FrozenLayer

__all__ = ["Poly", "PolyConfig"]

A, B, LOGITS = "poly_lora_A", "poly_lora_B", "poly_router.module_logits"
DOWN, UP = "down", "up"


@dataclass(kw_only=True)
class PolyConfig(PeftConfig):
    """Config of Poly.

    The model is then called with ``task_ids``, one for each sample, also in ``generate``. With one task they may be
    left out.

    Args:
        r: rank of a skill.
        init_weights: start with B = 0, so that nothing changes at first; else B is as random as A.
        poly_type: ``"poly"``, the only kind of router there is.
        n_tasks: how many tasks share the skills.
        n_skills: S, how many skills a layer has.
        n_splits: Q, into how many parts the layer's inputs and outputs are cut, each mixed by gates of its own
            (multi-head routing, Caccia et al. 2022, arXiv 2211.03831).
    """

    method = "POLY"
    only_here = frozenset({"layers_pattern", "layers_to_transform"})

    r: Count = 8
    init_weights: bool = True
    poly_type: Literal["poly"] = "poly"
    n_tasks: Count = 1
    n_skills: Count = 4
    n_splits: Count = 1


@register
class Poly(WeightMethod[PolyConfig]):
    """ΔW of task t = (1/r) · B_t · A_t, part q of A_t = Σ_s g_tqs A_qs, part q of B_t = Σ_s g_tqs B_qs.

    A (Q, S, in/Q, r), B (Q, S, r, out/Q), logits (tasks, Q·S); g = σ(logits) / Σ_s σ(logits). In training σ(logits)
    is a relaxed Bernoulli draw of temperature 1, one for each sample (one for the batch where no tasks are named).
    """

    config_class = PolyConfig
    mixes = True
    kinds = ("linear", "conv1d")
    size = "n_skills * (r * (d_in + d_out) + n_tasks * n_splits)"

    def start(self, config: PolyConfig, layer: FrozenLayer, generator: torch.Generator) -> dict[str, Tensor]:
        Q, S, r = config.n_splits, config.n_skills, config.r
        per_in, per_out = layer.in_features // Q, layer.out_features // Q
        # Bounds as of a linear layer with these inputs: Kaiming-uniform with a = √5.
        values = {A: torch.empty(Q, S, per_in, r), B: torch.zeros(Q, S, r, per_out), LOGITS: torch.empty(0)}
        nn.init.uniform_(values[A], -1 / math.sqrt(per_in), 1 / math.sqrt(per_in), generator)
        if not config.init_weights:
            nn.init.uniform_(values[B], -1 / math.sqrt(r), 1 / math.sqrt(r), generator)
        values[LOGITS] = nn.init.uniform_(torch.empty(config.n_tasks, Q * S), -1e-3, 1e-3, generator)
        return values

    def check(self, config: PolyConfig, layer: FrozenLayer, path: str) -> None:
        for name, size in (("inputs", layer.in_features), ("outputs", layer.out_features)):
            if size % config.n_splits:
                raise PeanutError(
                    f"n_splits={config.n_splits} for '{path}', which has {size} {name}",
                    f"a number that divides {size}",
                    "change n_splits",
                )

    def routed(self, config: PolyConfig, parameters: Values, tasks: Tensor | None, training: bool) -> Values:
        """The mixed factors: ``down`` (r, in) and ``up`` (out, r), with a leading batch dimension if tasks are named.

        Raises:
            PeanutError: there are several tasks and none is named, or one that is named does not exist.
        """
        skills_in, skills_out, logits = parameters[A], parameters[B], parameters[LOGITS]
        if tasks is None:
            if config.n_tasks > 1:
                raise PeanutError(
                    f"a Poly adapter for {config.n_tasks} tasks, and no task is named",
                    "task_ids, one for each sample",
                    "call the model, or generate, with task_ids=...; a weight to merge or export exists for n_tasks=1",
                )
            chosen = logits
        else:
            check_tasks(config, tasks)
            chosen = logits[tasks.to(logits.device)]
        gates = mixed(chosen.unflatten(-1, (config.n_splits, config.n_skills)), training)  # (batch, Q, S)
        down, up = weighed(gates, skills_in).flatten(1, 2).mT, weighed(gates, skills_out).mT.flatten(1, 2)
        return {DOWN: down[0], UP: up[0]} if tasks is None else {DOWN: down, UP: up}

    def change(self, config: PolyConfig, parameters: Values, layer: FrozenLayer) -> Change:
        own = parameters if DOWN in parameters else self.routed(config, parameters, None, False)
        if own[DOWN].dim() == 2:
            return Change(delta=LowRank(own[UP], own[DOWN], 1 / config.r))
        return Change(delta=PerSample(own[UP], own[DOWN], 1 / config.r))


def weighed(gates: Tensor, skills: Tensor) -> Tensor:
    """Σ_s g_bqs K_qs of gates (batch, Q, S) and skills (Q, S, n, m): (batch, Q, n, m).

    As a product of matrices; einsum would keep a copy of the skills.
    """
    summed = torch.bmm(gates.transpose(0, 1), skills.flatten(2))
    return summed.view(*summed.shape[:2], *skills.shape[2:]).transpose(0, 1)


def mixed(logits: Tensor, training: bool) -> Tensor:
    """The gates of all skills from their logits (…, S); they are positive and add up to one."""
    if training:
        tiny = torch.finfo(logits.dtype).eps
        noise = torch.rand_like(logits).clamp(tiny, 1 - tiny)
        logits = logits + noise.log() - (-noise).log1p()
    gates = torch.sigmoid(logits)
    return gates / (gates.sum(-1, keepdim=True) + 1e-12)


def check_tasks(config: PolyConfig, tasks: Tensor) -> None:
    """Refuses what is no task. Tasks stay on the CPU, so that no device has to be waited for."""
    if tasks.is_floating_point() or tasks.is_complex() or tasks.dtype == torch.bool:
        raise PeanutError(f"task_ids of {tasks.dtype}", "whole numbers", "convert them: task_ids.long()")
    if torch.compiler.is_compiling() or not tasks.numel():
        return
    least, most = int(tasks.min()), int(tasks.max())
    if least < 0 or most >= config.n_tasks:
        raise PeanutError(
            f"task {least if least < 0 else most} in task_ids",
            f"numbers from 0 to {config.n_tasks - 1} (n_tasks={config.n_tasks})",
            "correct task_ids",
        )
