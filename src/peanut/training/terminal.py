"""The terminal belongs to the program that runs, not to the libraries under it."""

from __future__ import annotations

__all__ = ["quiet"]


def quiet() -> None:
    """Leaves the terminal to this program: what transformers reports about a new head is no news here."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
