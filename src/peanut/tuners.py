"""Configs, models and layers of the methods, as ``peanut.tuners.lora`` has LoRA's, where Hugging Face PEFT has them."""

import sys
from types import ModuleType

from .public import submodule, tuners

__path__: list[str] = []  # as a package's, so that importing a name that we have not says why
__getattr__, __dir__ = submodule("tuners")

for _name in tuners():
    _parts = zip(("__getattr__", "__dir__"), submodule(f"tuners.{_name}"), strict=True)
    _found = dict(_parts, __path__=[])
    for _place in (_name, *(f"{_name}.{part}" for part in ("config", "layer", "model") if _name != "tuners_utils")):
        _module = ModuleType(f"{__name__}.{_place}", "Names of one method; see ``public.py``.")
        _module.__dict__.update(_found)
        sys.modules[_module.__name__] = _module
        setattr(sys.modules[_module.__name__.rpartition(".")[0]], _place.rpartition(".")[2], _module)
