"""Configs, models and layers of the methods, as ``peanut.tuners.lora`` has LoRA's, where Hugging Face PEFT has them."""

from .public import make_modules, submodule, tuners

__path__: list[str] = []  # as a package's, so that importing a name that we have not says why
__getattr__, __dir__ = submodule("tuners")

for _name in tuners():
    _parts = () if _name == "tuners_utils" else ("config", "layer", "model")
    make_modules(__name__, f"tuners.{_name}", (_name, *(f"{_name}.{part}" for part in _parts)))
