"""Benchmarks of the library itself: speed limits checked in CI, startup time, and a training run of every method.

It is not installed with the library; run it from the project's folder.
"""
