"""Finds an adapter's files: in a local folder or, if the user names one, in a repository on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import PeanutError

__all__ = ["HUB_OPTIONS", "locate"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_OPTIONS = (
    "subfolder",
    "revision",
    "token",
    "cache_dir",
    "force_download",
    "local_files_only",
    "etag_timeout",
    "endpoint",
    "headers",
)
"""Where on the hub an adapter is, and how it is fetched: keywords of every function that reads one."""


def locate(source: str | os.PathLike[str], file_name: str, *, subfolder: str | None = None, **options: Any) -> Path:
    """The path of one file of an adapter.

    Args:
        source: a folder, or a hub id ``owner/name``; a folder of that name always wins.
        file_name: the file.
        subfolder: folder inside ``source``.
        options: the others of ``HUB_OPTIONS``.

    Raises:
        PeanutError: the folder or the file is not there, or the hub does not give it.
    """
    folder = Path(source) / (subfolder or "")
    if os.path.isfile(folder / file_name):
        return folder / file_name
    if os.path.exists(source):
        held = list[str]()
        with suppress(OSError):
            held = sorted(os.listdir(folder))[:8]
        raise PeanutError(
            f"no '{file_name}' in '{folder}' (it holds {', '.join(held) or 'nothing'})",
            "the folder that save_pretrained wrote",
            "check the path",
        )
    if not _HUB_ID.fullmatch(str(source)):
        raise PeanutError(f"no folder '{source}'", "an adapter's folder or a hub id owner/name", "check the path")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(source), file_name, subfolder=subfolder, **options))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PeanutError(
            f"no folder '{source}', and the hub gives no '{file_name}' of that name: {reason}", do="check the name"
        ) from error
