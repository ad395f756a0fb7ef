"""Silences progress bars and warnings of other libraries on the terminal."""

from __future__ import annotations

__all__ = ["quiet"]


def quiet() -> None:
    """Silences what libraries report about new heads and faster kernels, which users of this program can ignore."""
    import logging

    from transformers.utils import logging as of_transformers

    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
