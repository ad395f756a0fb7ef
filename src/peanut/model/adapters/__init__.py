"""The adapters of a model: adding, activating, merging and deleting them."""
