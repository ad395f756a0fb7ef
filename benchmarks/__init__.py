"""What measures the library itself: its bounds in CI, what a user waits for, every method trained.

It is not installed with the library; run it from the project's folder.
"""
