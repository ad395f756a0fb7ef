"""Parameter-efficient fine-tuning (PEFT) for PyTorch and transformers: many methods, with PEANuT at the cost of LoRA.

>>> from peanut import PeanutConfig, get_peft_model
>>> model = get_peft_model(model, PeanutConfig(r=16, task_type="CAUSAL_LM"))  # doctest: +SKIP
"""

import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that ``import peanut`` itself costs nothing; see ``public.py``."""
    if name == "__all__":
        return __dir__()
    if name.startswith("__"):  # which Python asks of any module
        raise AttributeError(f"module 'peanut' has no attribute {name!r}")
    from .public import find

    value = globals()[name] = find(name)
    return value


def __dir__() -> list[str]:
    from .public import homes

    return ["__version__", *sorted(homes())]


for _name in ("auto", "config", "mapping", "mapping_func", "mixed_model", "peft_model"):  # as scripts import from there
    _module = ModuleType(f"peanut.{_name}", "The public names of this package.")
    globals()[_name] = sys.modules[_module.__name__] = _module
    _module.__dict__.update(__getattr__=__getattr__, __dir__=__dir__)
