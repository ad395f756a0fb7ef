"""Where adapters act in a model: around a layer's weight, behind a module's output, before its input."""
