"""Experiments with methods: packaged models and data, the demo, and the benchmark."""
