"""The command ``peanut``: one file per subcommand; heavy imports happen only when it runs."""

from .app import main

__all__ = ["main"]
