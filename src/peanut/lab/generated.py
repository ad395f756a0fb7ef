"""``make generated``: writes the files that follow from the registry (``docs/methods.md`` and the type stubs).

Both are of our own methods alone, whatever other packages are installed.
"""

from __future__ import annotations

import sys
from functools import partial
from importlib import import_module
from pathlib import Path

from ..files import write_files
from ..public import homes, ours
from .catalogue import catalogue, markdown

__all__ = ["files", "main"]

_HEAD = '''"""What type checkers read in place of ``__init__.py``: the public names. Written by ``make generated``."""

'''


def files() -> dict[str, str]:
    """What is written: contents by path in the repository."""
    return {"docs/methods.md": markdown(catalogue(ours())), "src/peanut/__init__.pyi": stub()}


def stub() -> str:
    """Every public name, imported from where it is; a class of model that is made when it is asked for, declared."""
    imports, classes = ["from .model.injection import AdaptedModel as _AdaptedModel"], []
    for name, home in homes().items():
        if name in import_module(f"..{home}", __package__).__all__:
            imports.append(f"from .{home} import {name} as {name}")
        else:
            classes.append(f"class {name}(_AdaptedModel): ...")
    return _HEAD + "\n".join([*sorted(imports, key=_order), "", "__version__: str", "", *sorted(classes), ""])


def _order(line: str) -> tuple[str, bool, str]:
    """That of the linter: by module, classes before functions."""
    _, module, _, name, *_ = line.split()
    return module, name[0].islower(), name.lower()


def main() -> int:
    """Writes the files into the repository that is the current folder; the exit status."""
    for path, text in files().items():
        content = text.encode()
        write_files(Path(path).parent, {Path(path).name: partial(Path.write_bytes, data=content)})
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
