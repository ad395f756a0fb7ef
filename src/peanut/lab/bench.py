"""``peanut bench``: what a method costs in a stack of layers or a model, against it frozen and Hugging Face PEFT.

All variants run in one process, in turn, round after round: a figure is the median over the rounds with its
quartiles, and a ratio is taken within each round before the median.

On a machine that does other work too, set ``OMP_WAIT_POLICY=passive``: otherwise a thread that waits for another one
keeps its processor busy, and what is measured is mostly that waiting.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import PeanutError
from ..files import make_folder
from .bench_report import Row, print_tables, write_report
from .measure import interleaved
from .model_variants import frozen_llama, model_configs, model_variants
from .variants import Settings, configs_of, frozen_stack, variants_of

__all__ = ["Settings", "main", "measure"]


def measure(settings: Settings) -> list[Row]:
    """Builds and measures every variant; the frozen stack's row comes first.

    Raises:
        PeanutError: a method's output differs from the peer's, so that a comparison would mean nothing.
    """
    from rich.console import Console
    from rich.progress import track

    device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
    narrow, wide = settings.dims
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(1, settings.tokens, narrow, generator=generator).to(device, dtype) for _ in range(2))
    token = x[:, :1].clone()
    x.requires_grad_()
    names = settings.methods or ()
    if settings.stack == "layers":
        configs = configs_of(names, settings.rank, settings.depth)
        variants = variants_of(configs, lambda: frozen_stack(narrow, wide, settings.blocks, device, dtype), x)
    else:
        configs = model_configs(names, settings.rank, settings.blocks)
        variants = model_variants(configs, lambda: frozen_llama(narrow, wide, settings.blocks, device, dtype), x)

    watched = functools.partial(track, console=Console(stderr=True))
    rows = []
    for variant in watched(variants, "memory"):
        variant.step(x, grad)  # warm-up: the optimiser's state and the libraries' scratch memory are made here
        saved, peak = variant.saved_bytes(x), variant.peak_bytes(x, grad)
        rows.append(Row(variant.method, variant.by, variant.trained_parameters, saved, peak, variant.difference))
    rounds = range(settings.repeats)
    steps = interleaved([functools.partial(variant.step, x, grad) for variant in variants], watched(rounds, "steps"))
    tokens = interleaved([variant.token_probe(token) for variant in variants], watched(rounds, "tokens"))
    for row, step, one in zip(rows, steps, tokens, strict=True):
        row.seconds = step | one
    return rows


def main(args: Sequence[str] | None = None) -> int:
    """``peanut bench``: measures, prints tables, writes JSON and a plot; the exit status."""
    options: dict[str, Any] = vars(_parser().parse_args(args))
    output = options.pop("output")
    before = torch.get_num_threads()
    try:
        settings = Settings(**options)
        make_folder(output)
        importlib.import_module("matplotlib")  # if it is missing, that is told now and not after minutes of measuring
        torch.set_num_threads(settings.threads)
        rows = measure(settings)
        print_tables(rows)
        for path in write_report(output, rows, settings):
            print(path)
    except PeanutError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(before)
    return 0


def _parser() -> argparse.ArgumentParser:
    default = Settings()
    parser = argparse.ArgumentParser(
        prog="peanut bench",
        description="Measures what methods cost in a stack of layers: time, memory, one token of generation.",
        epilog="On a machine that does other work too, set OMP_WAIT_POLICY=passive in the environment.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def option(name: str, text: str, kind: type = int, **more: object) -> None:
        usual = None if name == "methods" else getattr(default, name)
        parser.add_argument(f"--{name}", type=kind, default=usual, help=text, **more)  # type: ignore[arg-type]

    option(
        "stack",
        "plain layers, or a small Llama: for what changes outputs or inputs, and mixtures",
        str,
        choices=("layers", "transformer"),
    )
    option(
        "methods",
        "which, beside LoRA, the yardstick (default: all that need the stack)",
        str,
        nargs="+",
        metavar="METHOD",
    )
    option("tokens", "tokens that a training step reads")
    option("rank", "r of the methods that have one")
    option("depth", "depths of the methods that have one", nargs="+")
    option("dims", "the stack's two widths", nargs=2, metavar=("NARROW", "WIDE"))
    option("blocks", "blocks of two linear layers")
    option("dtype", "of weights and activations", str, choices=("float32", "bfloat16", "float16", "float64"))
    option("device", "as torch names it", str)
    option("repeats", "rounds")
    option("threads", "of the CPU")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for JSON and plot")
    return parser


if __name__ == "__main__":
    sys.exit(main())
