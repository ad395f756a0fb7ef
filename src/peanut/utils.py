"""Small functions and constants, where Hugging Face PEFT has them; see ``public.py``."""

from .public import submodule

__path__: list[str] = []  # as a package's, so that importing a name that we have not says why
__getattr__, __dir__ = submodule("utils")
