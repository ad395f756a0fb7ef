"""Parameter-efficient fine-tuning (PEFT) for PyTorch and transformers: many methods, with PEANuT at the cost of LoRA.

>>> from peanut import PeanutConfig, get_peft_model
>>> model = get_peft_model(model, PeanutConfig(r=16, task_type="CAUSAL_LM"))  # doctest: +SKIP
"""

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
