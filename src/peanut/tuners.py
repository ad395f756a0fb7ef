"""Configs, models and layers of the methods, as ``peanut.tuners.lora`` has LoRA's, where Hugging Face PEFT has them."""

import sys
from types import ModuleType

from .public import submodule, tuners

__path__: list[str] = []  # as a package's, so that importing a name that we have not says why
__getattr__, __dir__ = submodule("tuners")

for _name in tuners():
    _module = ModuleType(f"{__name__}.{_name}", "Names of one method; see ``public.py``.")
    _module.__dict__.update(zip(("__getattr__", "__dir__"), submodule(f"tuners.{_name}"), strict=True), __path__=[])
    sys.modules[_module.__name__] = globals()[_name] = _module
