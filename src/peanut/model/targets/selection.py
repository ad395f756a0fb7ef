"""Which of the matched paths exclude_modules and layers_to_transform leave."""

from __future__ import annotations

from torch import nn

from ...errors import PeanutError, shown
from ...protocols import PeftConfig
from ...protocols.patterns import fullmatch
from .paths import Modules, last_names, matched, unknown_name, unmatched

__all__ = ["block_index", "selected"]


def selected(model: nn.Module, paths: list[str], config: PeftConfig, modules: Modules) -> list[str]:
    """The paths that ``exclude_modules`` and ``layers_to_transform`` leave."""
    excluded = config.exclude_modules
    if excluded:
        hits = matched(modules, excluded)
        wrong = unmatched(hits, excluded)
        if wrong is not None:
            raise unknown_name("exclude_modules", wrong, model, last_names(modules))
        taken = set(hits)
        paths = [path for path in paths if path not in taken]
    wanted = config.layers_to_transform
    if wanted is None:
        return paths
    indices = {wanted} if isinstance(wanted, int) else set(wanted)
    by_path = {path: block_index(path, config.layers_pattern) for path in paths}
    present = sorted({index for index in by_path.values() if index is not None})
    missing = sorted(indices.difference(present))
    if missing:
        blocks = f"blocks {present[0]} to {present[-1]}" if present else "no numbered block"
        pattern = f" under layers_pattern={config.layers_pattern!r}" if config.layers_pattern else ""
        raise PeanutError(
            f"layers_to_transform names {shown(missing)}, and the targets lie in {blocks}{pattern}",
            "indices of blocks that hold a target",
            "change layers_to_transform or layers_pattern",
        )
    return [path for path in paths if by_path[path] in indices]


def block_index(path: str, pattern: list[str] | str | None) -> int | None:
    """The index of the block that ``path`` is or lies in: the first number after a list called as the pattern says."""
    lists = [pattern] if isinstance(pattern, str) else pattern or [r"[^.]*"]
    for name in lists:
        match = fullmatch(name, f"{path}.", before=r"(?:.*?\.)??", after=r"\.(?P<index>\d+)\..*")
        if match:
            return int(match["index"])
    return None
