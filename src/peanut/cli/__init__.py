"""The command ``peanut``: one file a subcommand, each imports what is heavy only when it runs."""

from .app import main

__all__ = ["main"]
