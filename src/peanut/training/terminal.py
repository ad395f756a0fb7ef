"""Silences progress bars and warnings of other libraries on the terminal."""

from __future__ import annotations

__all__ = ["quiet"]


def quiet() -> None:
    """Leaves the terminal to this program: what libraries report about heads and faster kernels is no news here."""
    import logging

    from transformers.utils import logging as of_transformers

    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
