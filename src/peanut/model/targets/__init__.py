"""Which modules of a model an adapter changes: names and patterns, architectures, sizes."""
