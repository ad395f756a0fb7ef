"""Modules that apply adapters: to a layer's weight, a module's output, or the model's input."""
