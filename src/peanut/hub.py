"""Finds an adapter's files in a folder or in a repository on the Hugging Face hub, and uploads them there."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import PeanutError, check_keywords

__all__ = ["CARD_NAME", "HUB_OPTIONS", "HUB_WITHOUT_EFFECT", "locate", "push"]

CARD_NAME = "README.md"
"""The model card."""

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
HUB_WITHOUT_EFFECT: dict[str, tuple[Any, ...] | None] = {
    "_commit_hash": None,
    "_from_auto": None,
    "_from_pipeline": None,
    "force_filename": None,
    "library_name": None,
    "library_version": None,
    "local_dir_use_symlinks": None,
    "mirror": None,
    "proxies": None,
    "repo_type": ("model", None),
    "resume_download": None,
    "use_auth_token": (False, None),
    "user_agent": None,
}
"""What scripts and transformers also give for it, of no effect, each with the values of which that is so (all)."""


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


_PUSH = ("commit_description", "create_pr", "private", "revision", "token")


def push(repo_id: str, save: Callable[[Path], object], commit_message: str, given: Mapping[str, Any]) -> Any:
    """Uploads what ``save`` writes into an empty folder; the README.md that the repository has is put there first.

    ``given`` are the options: how the repository is made and reached, and what the commit says.

    Raises:
        PeanutError: an option is unknown, or the hub refuses or cannot be reached.
    """
    options = check_keywords("push_to_hub", given, _PUSH, {})
    revision, token = options.get("revision"), options.get("token")
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi(token=token)
    try:
        name = str(api.create_repo(repo_id, private=options.get("private"), exist_ok=True).repo_id)
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(name, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            with suppress(HfHubHTTPError, OSError):
                shutil.copy(hf_hub_download(name, CARD_NAME, revision=revision, token=token), folder)
            save(Path(folder))
            return api.upload_folder(
                repo_id=name,
                folder_path=folder,
                commit_message=commit_message,
                commit_description=options.get("commit_description"),
                revision=revision,
                create_pr=options.get("create_pr", False),
            )
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PeanutError(f"'{repo_id}' is not uploaded: {reason}", do="check its name and your token") from error
