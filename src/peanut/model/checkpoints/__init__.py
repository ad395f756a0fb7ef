"""Saving and loading adapters: files, tensor names, fingerprints of the base model."""
