"""Adapters in a model: put in, switched, merged, saved and loaded."""
