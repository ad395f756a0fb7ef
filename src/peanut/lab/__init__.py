"""Experiments on methods: real models and data to try them on, the demonstration, benchmarks and comparisons."""
