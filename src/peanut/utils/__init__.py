"""Small functions and constants, where Hugging Face PEFT has them; see ``public.py``."""

from ..public import submodule

__getattr__, __dir__ = submodule("utils")
