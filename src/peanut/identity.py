"""``Recognised``: objects that ``isinstance`` takes for Hugging Face PEFT's own too, where that library is imported."""

from __future__ import annotations

import sys
from abc import ABCMeta
from typing import Any

__all__ = ["Recognised"]


class Recognised:
    """An object that other libraries, which ask for a class of Hugging Face PEFT's, are to treat as one of it.

    ``isinstance`` looks at an object's type, then at what it says that its ``__class__`` is: here, while Hugging Face
    PEFT is imported, a class that inherits from both. No object is ever made of that class, so nothing of the other
    library is inherited; ``type(x)`` stays as it was.
    """

    def counterparts(self) -> tuple[tuple[str, str], ...]:
        """The classes that this object may stand for, each as a module of Hugging Face PEFT and a name in it.

        The first that is there is taken. It is asked wherever ``isinstance`` finds that an object is none of a class.
        """
        return ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        made: Any = super().__reduce_ex__(max(protocol, 2))
        if getattr(made[0], "__name__", "") != "__newobj__":
            return made
        return (_blank, *made[1:])  # pickle refuses a __newobj__ of another class than __class__

    @property
    def _class(self) -> type:
        own = type(self)
        if "peft" not in sys.modules:
            return own
        key = own, self.counterparts()
        return _ANSWERS[key] if key in _ANSWERS else _answer(*key)

    @_class.setter
    def _class(self, new: type) -> None:
        object.__dict__["__class__"].__set__(self, new)

    __class__ = _class


def _blank(own: type, *args: Any) -> Any:
    return own.__new__(own, *args)


class _Answer(ABCMeta):  # as some of the other library's are
    """The class of what ``__class__`` answers: whoever derives from it, or calls it, gets the object's own class."""

    own: type

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
        plain = tuple(base.own if isinstance(base, _Answer) else base for base in bases)
        if plain == bases:
            return super().__new__(mcs, name, bases, namespace)
        return type(name, plain, namespace)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.own(*args, **kwargs)


_ANSWERS: dict[tuple[type, tuple[tuple[str, str], ...]], type] = {}


def _answer(own: type, counterparts: tuple[tuple[str, str], ...]) -> type:
    found = (getattr(sys.modules.get(module), name, None) for module, name in counterparts)
    theirs = next(filter(None, found), None)
    if theirs is None:  # it is being imported
        return own
    parts = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__, "own": own}
    answer: type = _Answer(own.__name__, (own, theirs), parts)
    return _ANSWERS.setdefault((own, counterparts), answer)
