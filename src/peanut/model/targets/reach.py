"""Which weights of a model no adapter reaches, as no layer that can be adapted holds them: fused experts, for one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ...errors import OutOfReachWarning, warn
from ...protocols import PeftConfig
from ..layers.layer import AdaptedLayer
from ..layers.saved_modules import SavedModule
from .matching import is_all_linear
from .paths import bare, inside_attention, kind_name, modules_by_path

__all__ = ["Reach", "reach_of", "warn_of_unreached"]

LEAST = 0.01
"""The share of a model's weights from which on it is spoken of."""


@dataclass(frozen=True)
class Reach:
    """How many of a base model's weights no adapter reaches.

    Args:
        total: the weights of the base model.
        unreached: those in matrices that no adaptable layer holds, by the module's class and the parameter's name, most
            first. Vectors (norms, biases), and tables for a whole batch (positions), are not counted.
        linear: those of them that a user who asks for every linear layer may expect: all but those of convolutions.
    """

    total: int
    unreached: dict[str, int]
    linear: int

    def __str__(self) -> str:
        """The share and where they are; empty where it is negligible."""
        count = sum(self.unreached.values())
        if count < LEAST * self.total:
            return ""
        names = list(self.unreached)
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return f"{count:,d} of {self.total:,d} weights ({100 * count / self.total:.1f}%), in {shown}"


def reach_of(model: nn.Module) -> Reach:
    """Counts a base model's weights; its adapters are left out."""
    modules = modules_by_path(model)
    reached: set[str] = set()
    counts: dict[int, int] = {}
    names: dict[int, str] = {}
    convolved: set[int] = set()
    for path, module in {"": model, **modules}.items():
        whole = isinstance(module, SavedModule)  # trained whole by an adapter
        own: nn.Module = module.original_module if isinstance(module, SavedModule) else bare(module)
        adapted = isinstance(module, AdaptedLayer)
        adaptable = adapted or (kind_name(own) is not None and not inside_attention(path, modules))
        if whole or adaptable or (path and path.rpartition(".")[0] in reached):
            reached.add(path)
        for name, parameter in own.named_parameters(recurse=adapted or is_parametrized(own)):
            counts[id(parameter)] = parameter.numel()
            if path in reached or not _is_matrix(parameter):
                names[id(parameter)] = ""  # of a shared weight one reached place is enough
            else:
                names.setdefault(id(parameter), f"{type(own).__name__}.{name}")
            if isinstance(own, nn.modules.conv._ConvNd):
                convolved.add(id(parameter))
    unreached: dict[str, int] = {}
    for key, name in names.items():
        if name:
            unreached[name] = unreached.get(name, 0) + counts[key]
    return Reach(
        sum(counts.values()),
        dict(sorted(unreached.items(), key=lambda item: -item[1])),
        sum(count for key, count in counts.items() if names[key] and key not in convolved),
    )


def warn_of_unreached(model: nn.Module, config: PeftConfig) -> None:
    """Says it to a user who asks for every linear layer and may take all large matrices for such."""
    if not is_all_linear(config.target_modules):
        return
    reach = reach_of(model)
    if reach.linear >= LEAST * reach.total:
        warn(
            f"'all-linear' does not reach {reach}: no linear layer that is called holds these, so they stay frozen",
            OutOfReachWarning,
        )


def _is_matrix(parameter: Tensor) -> bool:
    """Whether it is a matrix, or a stack of them; not a vector, nor a table with a dimension for the batch."""
    return sum(size > 1 for size in parameter.shape) > 1 and parameter.shape[0] > 1
