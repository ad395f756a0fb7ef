"""Virtual tokens and prefixes around a model's forward: masks, positions, labels, caches, gates of mixtures."""
