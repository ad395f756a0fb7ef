"""Helpers under the names of ``peft.helpers``."""

from .model.functional import rescale_adapter_scale

__all__ = ["rescale_adapter_scale"]
