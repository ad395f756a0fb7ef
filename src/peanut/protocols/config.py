"""``PeftConfig``: the config of a method, validated when created, read from and written to ``adapter_config.json``."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import KW_ONLY, dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import PeanutError, check_keywords, shown
from ..files import read_json, write_json
from ..hub import HUB_OPTIONS, HUB_WITHOUT_EFFECT, locate, push
from ..identity import Recognised
from .arguments import checked
from .known_fields import known_fields
from .names import Names
from .patterns import MOST_EXPRESSIONS, check_pattern, check_patterns, matching_pattern, outer
from .registry import CONFIG_CLASSES, PeftType, method_of, name_of
from .values import Whole, check_types

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "CONFIG_CLASSES",
    "CONFIG_NAME",
    "FORMAT_VERSION",
    "PeftConfig",
    "PeftType",
    "TaskType",
    "default_of",
    "get_peft_config",
]

CONFIG_NAME = "adapter_config.json"
LABEL = "+peanut."
"""What comes between the version in a saved config and the id of the save."""
FORMAT_VERSION = "0.21.2"
"""The version of Hugging Face PEFT whose file format is written."""


class TaskType(str, Enum):
    """What the adapted model is for; the task decides which head is trained beside the adapter."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


_BY_POSITION = 7
"""How many fields may be given without a name: those that all configs of Hugging Face PEFT begin with."""


class _Signature:
    """A class's signature, for ``inspect``, is its ``__init__``'s, whatever its ``__new__`` takes."""

    def __get__(self, _: object, own: type) -> inspect.Signature:
        _, *parameters = inspect.signature(own.__init__).parameters.values()  # type: ignore[misc]
        return inspect.Signature(parameters)


@dataclass
class PeftConfig(Recognised):
    """What every method's config holds.

    Args:
        task_type: a ``TaskType`` or its name.
        peft_type: the method; set by the class, and checked if given.
        auto_mapping: class and library of a base model that the Auto classes do not know.
        peft_version: version of the file format.
        base_model_name_or_path: the model that the adapter was trained on.
        inference_mode: whether the adapter's parameters are frozen.
        target_modules: the layers to adapt: names (a name matches every module path that ends in it), one regular
            expression for whole paths, ``"all-linear"``, or ``None`` for the architecture's default.
        exclude_modules: names, or a regular expression, of layers to leave out.
        modules_to_save: names of modules that are trained whole beside the adapter and saved with it.
        layers_to_transform: indices of the blocks whose layers are adapted; all if ``None``.
        layers_pattern: name of the list of blocks (``"layers"``, ``"h"``), if it is not a path's first numbered part.

    Raises:
        PeanutError: a value is out of range, or a keyword is unknown.
    """

    __signature__ = _Signature()
    method: ClassVar[str]
    """The method's name in files, unique among the registered ones: what makes a config class that method's."""
    only_here: ClassVar[frozenset[str]] = frozenset()
    """Fields that Hugging Face PEFT does not know: written to files only where they differ from their default."""
    prompts: ClassVar[bool] = False
    """Whether the method adds virtual tokens."""
    required: ClassVar[tuple[str, ...]] = ()
    """Numbers without a default, which have to be set before an adapter is made."""
    by_layer: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Fields whose value may differ between layers, each with the field that holds it by name or pattern."""

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    _: KW_ONLY
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[Whole] | Whole | None = None
    layers_pattern: list[str] | str | None = None

    def __new__(cls, *args: Any, **given: Any) -> Self:
        own: Any = cls
        if len(args) > _BY_POSITION:  # the order of the others is not the same in all libraries
            raise PeanutError(
                f"{cls.__name__} is given {shown(args[_BY_POSITION])} without a name",
                f"keywords, but for the first {_BY_POSITION}",
                f"write {(_keywords(own) or ['name'])[-1]}=… and the like",
            )
        check_keywords(cls.__name__, given, _keywords(own) or given, {})
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_types(self)
        given = self.peft_type
        if given is not None and name_of(given) != self.method:
            raise PeanutError(
                f"peft_type={given!r} in a {type(self).__name__}", repr(self.method), "use that method's own config"
            )
        self.peft_type = PeftType(self.method)
        self.peft_version = self.peft_version or FORMAT_VERSION
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            value = getattr(self, name)
            if isinstance(value, str):
                check_pattern(name, value)
            elif value is not None:
                if not all(value):
                    raise PeanutError(f"{name}={shown(value)}", "a list of names", "remove what is not a name")
                setattr(self, name, Names(value))
        for _, patterns in self.by_layer:
            check_patterns(patterns, getattr(self, patterns) or {})
        if isinstance(self.layers_pattern, list) and len(self.layers_pattern) > MOST_EXPRESSIONS:
            raise PeanutError(
                f"layers_pattern has {len(self.layers_pattern):,} names", f"at most {MOST_EXPRESSIONS:,}", "use fewer"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise PeanutError(
                f"layers_pattern={shown(self.layers_pattern)} without layers_to_transform",
                "both or neither",
                "name the blocks' indices in layers_to_transform",
            )

    def counterparts(self) -> tuple[tuple[str, str], ...]:
        own: Any = type(self)
        return _counterparts(own)

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method adds virtual tokens (no weight method does).

        Raises:
            PeanutError: a function of Hugging Face PEFT asks, as all do first: it would make of this what its own
                config of that name says, or nothing.
        """
        asking = sys._getframe(1)
        module = str(asking.f_globals.get("__name__"))
        if module.partition(".")[0] == "peft":
            raise PeanutError(
                f"{module}.{asking.f_code.co_name}, given a {type(self).__name__} of this library",
                "a config or a model of Hugging Face PEFT",
                "call peanut.install() once, before (for functions), or use what is of this name in peanut",
            )
        return self.prompts

    @property
    def is_adaption_prompt(self) -> bool:
        return self.method == "ADAPTION_PROMPT"

    def patterns(self) -> Mapping[str, Collection[str]]:
        """By field, the names and regular expressions that are for some of the adapted layers."""
        return {patterns: getattr(self, patterns) or {} for _, patterns in self.by_layer}

    def for_layer(self, path: str) -> Self:
        """This config with what its patterns say for the layer at ``path`` filled in."""
        found: dict[str, Any] = {}
        for name, patterns in self.by_layer:
            values = getattr(self, patterns) or {}
            pattern = matching_pattern(values, outer(path))
            if pattern is not None:
                found[name] = values[pattern]
        if not found:
            return self
        return dataclasses.replace(self, **found | {patterns: {} for _, patterns in self.by_layer})

    def version(self) -> tuple[str, str]:
        """The version of the file format, and the id of the save, which is empty if a file's writer gave it none."""
        version, _, save = str(self.peft_version).partition(LABEL)
        return version, save

    def check_given(self) -> None:
        """Refuses a config that lacks a number that has no default."""
        for name in self.required:
            if getattr(self, name) is None:
                raise PeanutError(f"{name} is not given", "a whole number of at least 1", "set it")

    def to_dict(self) -> dict[str, Any]:
        """The config as ``adapter_config.json`` holds it: plain values, the same for the same config."""
        plain: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in self.only_here and value == default_of(field):
                continue
            value = sorted(set(value)) if isinstance(value, Names) else value
            plain[field.name] = value.value if isinstance(value, (Enum, PeftType)) else value
        return plain

    @checked
    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Writes ``adapter_config.json`` into a folder."""
        write_json(Path(save_directory) / CONFIG_NAME, self.to_dict())

    def push_to_hub(self, repo_id: str, *, commit_message: str = "Upload config", **options: Any) -> Any:
        """Uploads ``adapter_config.json`` alone; options and errors: see ``PeftModel.push_to_hub``."""
        return push(repo_id, self.save_pretrained, commit_message, options)

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """What a file of a config says of the adapter, as a dictionary; ``kwargs`` are accepted for scripts."""
        return {name: value for name, value in read_json(Path(path_json_file)).items() if name != "runtime_config"}

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """A config of the class that ``peft_type`` names, with the other keywords as its fields."""
        return cls.from_dict(kwargs)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "the config") -> PeftConfig:
        """The config that ``values`` describes, of the class that its ``peft_type`` names.

        Fields that this library does not have are accepted as long as they have no effect; those of a later version of
        Hugging Face PEFT than the one whose format is written (``FORMAT_VERSION``) are told in one warning and ignored.
        ``None`` is the default of a field that cannot be so.

        Raises:
            PeanutError: the method is unknown, or a field requests something that does not exist here or is wrong.
        """
        method = method_of(values.get("peft_type") or getattr(cls, "method", None), source)
        config_class: type[PeftConfig] = method.config_class
        known = known_fields(config_class, values, source, FORMAT_VERSION)
        try:
            return config_class(**{name: value for name, value in values.items() if name in known})
        except PeanutError as error:
            raise PeanutError(f"{source}: {error.found}", error.expected, error.do, detail=error.detail) from None

    @classmethod
    @checked
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **hub: Any) -> PeftConfig:
        """The config in an adapter's folder (or, if the user names one, on the hub)."""
        config = cls.read(pretrained_model_name_or_path, **hub)
        config.peft_version, _ = config.version()
        return config

    @classmethod
    def read(cls, pretrained_model_name_or_path: str | os.PathLike[str], **hub: Any) -> PeftConfig:
        """The config as a folder has it, with the label of its save in ``peft_version``."""
        hub = check_keywords(f"{cls.__name__}.from_pretrained", hub, HUB_OPTIONS, HUB_WITHOUT_EFFECT)
        path = locate(pretrained_model_name_or_path, CONFIG_NAME, **hub)
        values = read_json(path)
        if not isinstance(values, dict):
            raise PeanutError(f"'{path}' holds {type(values).__name__}", "a JSON object", "save the adapter again")
        return cls.from_dict(values, source=f"'{path}'")

    def __str__(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)


def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfig:
    """The config that a dictionary with a ``peft_type`` describes."""
    return PeftConfig.from_dict(config_dict)


@cache
def _counterparts(config_class: type) -> tuple[tuple[str, str], ...]:
    return tuple(("peft", own.__name__) for own in config_class.__mro__)


@cache
def _keywords(config_class: type[PeftConfig]) -> list[str]:
    """The keywords that a config class knows; none where it takes any."""
    parameters = inspect.signature(config_class).parameters
    return [] if any(each.kind is each.VAR_KEYWORD for each in parameters.values()) else list(parameters)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The value that a field has where none is given."""
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
