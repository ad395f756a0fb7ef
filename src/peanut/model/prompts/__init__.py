"""Virtual tokens and prefixes in a forward: inputs, masks, positions, labels, caches; and the gates of mixtures."""
