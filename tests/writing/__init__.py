"""Ways in which programs write to tensors of a model: what the tests of kept values try each method with.

A way is given what it is to write to before any call (so that it may take a view, a NumPy array or an optimizer) and
returns the function that writes; most write what they are given, optimizers and initialisers something near or else.
"""

from __future__ import annotations

from .adapters import ADAPTERS, CALLS
from .memory import MEMORY
from .modules import MODULES, PLACE
from .optimizers import MANY, OPTIMIZERS
from .target import Slot, Target, Way, slots_of
from .tensors import DATA, IN_PLACE

__all__ = ["ANY", "FEW", "OPTIMIZERS", "WAYS", "Slot", "Target", "Way", "slots_of"]

ANY: dict[str, Way] = {**IN_PLACE, **DATA, **MEMORY, **PLACE, **MODULES, **MANY, **OPTIMIZERS, **CALLS}
"""Ways to write to any parameter."""
WAYS: dict[str, Way] = {**ANY, **ADAPTERS}
FEW = [
    "SGD, fused",
    "data.copy_",
    "data = new in the old memory",
    "numpy of detach()",
    "setattr",
    "functional_call, one memory",
    "data -= lr grad, zeroed in place",
    "half() and back",
    "swap_tensors",
    "copy_",
]
"""Ways that differ most in what can be seen of them."""
