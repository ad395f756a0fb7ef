"""``peanut train``: trains an adapter as a YAML file describes."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from ..training.terminal import quiet
from .flags import config_keys, parse_flags

if TYPE_CHECKING:
    from ..training.plan import Plan
    from ..training.run import RunResult

__all__ = ["TrainCommand", "train"]


class TrainCommand(TyperCommand):
    """The command whose help also lists the keys of the config."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        from rich.console import Console
        from rich.table import Table

        table = Table(
            "flag", "default", title="Keys of the YAML file, each also a flag", title_justify="left", box=None
        )
        for key, _, default in config_keys():
            table.add_row(f"--{key}", default)
        table.add_row("--adapter.…", "every field of the method's config: r, depth, act_fn, target_modules, …")
        Console().print(table)


def train(
    context: typer.Context,
    config: Annotated[Path | None, typer.Argument(help="The run's YAML file.", show_default=False)] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan (modules, parameters, memory), stop.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew in a folder that holds a run.")] = False,
) -> None:
    """Train an adapter; run again after an interruption, continue from the last checkpoint.

    The YAML file has the sections model, data, adapter, training and the keys task, output.
    Every key is also a flag: --training.epochs 3 --adapter.r 8. Flags win, and can replace the file.
    """
    from ..errors import PeanutError

    # With a flag in the first place typer takes its name for the file.
    overrides, files = parse_flags([str(config), *context.args] if config else context.args)
    if len(files) > 1 or not (files or overrides):
        raise PeanutError(f"{len(files)} YAML files and {len(overrides)} keys", "one file, or flags", "see --help")
    quiet()
    from ..training.config import load_config
    from ..training.run import plan as make_plan
    from ..training.run import train as run

    loaded = load_config(files[0] if files else None, overrides)
    if dry_run:
        _print_plan(make_plan(loaded))
    else:
        _print_result(run(loaded, overwrite=overwrite))


def _print_plan(plan: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    config, memory = plan.config, plan.memory
    trained = plan.adapter_parameters + plan.head_parameters
    table = Table(title="Plan", title_justify="left", show_header=False, box=None)
    table.add_row("model", config.model.path)
    table.add_row("task", config.task + (f", {len(plan.classes)} classes" if plan.classes else ""))
    table.add_row("rows", f"{plan.train_rows:,} to train on, {plan.eval_rows:,} to evaluate on")
    table.add_row("steps", f"{plan.steps:,}")
    table.add_row("method", f"{config.adapter.peft_type} on {len(plan.modules)} modules")
    for pattern, count in Counter(re.sub(r"\b\d+\b", "*", path) for path in plan.modules).items():
        table.add_row("", f"{pattern} ({count})")
    table.add_row("trained whole", ", ".join(plan.heads) or "nothing")
    share = 100 * trained / plan.all_parameters
    table.add_row(
        "parameters",
        f"{trained:,} trained ({plan.adapter_parameters:,} adapter, {plan.head_parameters:,} head), {share:.3f}% of "
        f"{plan.all_parameters:,}",
    )
    if plan.out_of_reach:
        table.add_row("out of reach", plan.out_of_reach)
    parts = ("weights", "gradients", "optimizer", "activations")
    table.add_row("memory (estimate)", ", ".join(f"{part} {_mib(getattr(memory, part))}" for part in parts))
    more = "" if memory.activations is not None else "activations, "
    table.add_row("", f"{_mib(memory.total)} in all, for the longest rows; {more}allocator and temporaries come on top")
    Console().print(table)


def _print_result(result: RunResult) -> None:
    from rich.console import Console
    from rich.table import Table

    heading = {"trained": "Trained", "resumed": "Trained (resumed)", "finished": "Finished before"}[result.status]
    table = Table(title=heading, title_justify="left", show_header=False, box=None)
    for name, value in result.metrics.items():
        table.add_row(name, f"{value:.4f}")
    table.add_row("step", f"{result.step:,} of {result.steps:,}")
    table.add_row("trained parameters", f"{result.trained_parameters:,}")
    if result.dropped_rows:
        table.add_row("rows left out", f"{result.dropped_rows:,} (no answer within data.max_length)")
    table.add_row("seconds", f"{result.seconds:.1f}")
    table.add_row("adapter", str(result.adapter))
    console = Console(soft_wrap=True)
    console.print(table)
    if result.status == "finished":
        console.print("Nothing was done: this run is complete. Pass --overwrite to train it anew.")


def _mib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**20:,.0f} MiB"
