"""Small functions and constants, where Hugging Face PEFT has them; see ``public.py``."""

from ..public import make_modules, submodule

__getattr__, __dir__ = submodule("utils")
make_modules(__name__, "utils", ("constants", "other", "peft_types", "save_and_load"))
