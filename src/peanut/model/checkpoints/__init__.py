"""Adapters in files: keys, fingerprints of the base, saving and loading."""
