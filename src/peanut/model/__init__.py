"""Adapters in a model: put in, switched, merged, saved and loaded."""

from .. import methods as methods  # so that every method is registered wherever this floor is entered
