"""The command-line parser: subcommands, and errors printed as one line."""

from __future__ import annotations

import sys
import warnings

import typer

from ..errors import PeanutError
from .bench import bench
from .evaluate import evaluate
from .export import export
from .generate import generate
from .inspect import inspect
from .merge import merge
from .methods import methods
from .train import TrainCommand, train

__all__ = ["app", "main"]

app = typer.Typer(
    name="peanut",
    help="Parameter-efficient fine-tuning with PEANuT and its kin.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True}

app.command(cls=TrainCommand, context_settings=FLAGS)(train)
app.command(name="eval", context_settings=FLAGS)(evaluate)
app.command()(generate)
app.command()(merge)
app.command()(export)
app.command()(inspect)
app.command()(methods)
app.command(context_settings=FLAGS, add_help_option=False)(bench)


def main() -> None:
    """Runs the command line; a wrong input is one line on standard error and the exit status 2."""
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        app()
    except PeanutError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "peanut":
            raise
        _fail(
            f"the module {error.name!r} is not installed; expected the extra 'train'; pip install 'peanut-peft[train]'"
        )


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
