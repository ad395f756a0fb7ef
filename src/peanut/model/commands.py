"""``AdapterCommands``: what a ``PeftModel`` and its ``base_model`` both do with adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..protocols import PeftConfig
from ..protocols.arguments import checked
from .adapters.adapter_set import AdapterSet

__all__ = ["AdapterCommands"]


class AdapterCommands:
    """Which adapters a model has, which act, which are trained, which are merged."""

    @property
    def adapters(self) -> AdapterSet:
        """The adapters in the model."""
        raise NotImplementedError

    def _base(self) -> nn.Module:
        """The base model as it was given: what torch.compile had put around it is there still."""
        modules: Any = self._modules  # type: ignore[attr-defined]  # of an nn.Module
        base: nn.Module = modules["base_model" if "base_model" in modules else "model"]
        return base._base() if isinstance(base, AdapterCommands) else base

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The adapters' configs by name."""
        return self.adapters.configs

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters; their changes add."""
        return list(self.adapters.state.active)

    @checked
    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes one adapter, or several whose changes then add, active; the others are frozen and unused.

        What is merged and is not among them is unmerged, and one warning says so.
        """
        self.adapters.activate(adapter_name, trainable=not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Takes an adapter out of the model; if none is active then, the first left becomes so, with a warning."""
        self.adapters.delete(adapter_name)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Trains or freezes adapters; which are active stays as it is."""
        self.adapters.set_requires_grad(adapter_names, requires_grad)

    @checked
    def merge_adapter(self, adapter_names: Sequence[str] | str | None = None, safe_merge: bool = True) -> None:
        """Writes adapters (default: the active ones) into the weights; the others stay as they are.

        What is written to a merged weight afterwards is lost when it is unmerged, which restores what was there before.
        ``safe_merge`` is accepted for scripts: a merge that is not finite is always refused and undone.
        """
        self.adapters.merge(adapter_names)

    def unmerge_adapter(self) -> None:
        """Restores every weight bit for bit."""
        self.adapters.unmerge()

    @checked
    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = True, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """The base model with the adapters merged for good, and no trace of this library in it."""
        self.adapters.adopt(adapter_names)
        return self._base()

    def unload(self) -> nn.Module:
        """The base model as it was, without adapters."""
        self.adapters.unload()
        return self._base()
