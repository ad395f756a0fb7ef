"""One file per method. Importing this package registers all of them, and those of installed packages.

A package of one's own joins by an entry point of the group ``peanut.methods`` that names a module: importing it
registers its methods (``protocols.register``).
"""

from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pkgutil import iter_modules

from ..errors import PeanutError


def _plug_in(point: EntryPoint) -> None:
    try:
        import_module(point.module)
    except Exception as error:
        package = f" of {point.dist.name} {point.dist.version}" if point.dist else ""
        raise PeanutError(
            f"the plug-in {point.name!r}{package} cannot be imported: {type(error).__name__}: {error}",
            f"a module {point.module!r} that registers methods",
            "update that package, or uninstall it",
        ) from error


for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
for _point in entry_points(group=__name__):
    _plug_in(_point)
