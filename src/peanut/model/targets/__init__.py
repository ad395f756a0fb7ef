"""Which modules an adapter changes: names and patterns, defaults by architecture, and sizes of the model."""
