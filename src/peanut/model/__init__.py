"""Adapters in a model: adding, activating, merging, saving and loading them."""

from .. import methods as methods  # so that every method is registered wherever this floor is entered
