"""``peanut bench``: speed and memory of methods against the frozen model and against Hugging Face PEFT.

All variants run in one process, in turn, round after round: a figure is the median over the rounds with its
quartiles, and a ratio is taken within each round before the median. What is compared holds the same parameters and
gives the same output.

On a machine that does other work too, set ``OMP_WAIT_POLICY=passive``: otherwise a thread that waits for another one
keeps its processor busy, and what is measured is mostly that waiting.

The JSON file:

- ``versions`` of ``peanut``, ``torch`` and ``peft`` (``null`` where it is not installed), ``hardware`` (the processor's
  name), ``wait_policy`` (the environment's), ``settings`` (``Settings``, by name);
- ``variants``, the frozen stack first, each with

  - ``method`` (empty for the frozen stack) and ``by``: ``frozen``, ``peanut`` or ``peft``;
  - ``trained_parameters``; ``difference`` of PEFT's output from ours, relative to the largest entry; ``note``, why
    a row of PEFT is missing, lacks a figure or comes from fewer rounds (one that has taken a minute sits out the rest);
  - ``saved_bytes``: kept by a forward for the backward beyond parameters and layers' inputs, and beyond what the
    frozen model keeps, whose own row tells that; ``peak_bytes``: the most that a training step holds beyond weights,
    optimiser state and input; ``evaluation_bytes``: the most that the first forward in evaluation holds, with what is
    kept for those that follow; ``file_bytes``: the saved tensors, ``null`` for the frozen stack;
  - ``seconds``: ``forward``, ``backward`` and the whole training ``step``; of evaluation one ``token`` through layers,
    ``generate`` (seconds a token of a model that writes with a cache, its prompt of 32 tokens included) or one row's
    ``answer``; ``inject``, ``save`` and ``load``. Each with ``median``, ``low`` and ``high`` (quartiles) and ``least``;
  - ``ratios`` to the ``frozen`` stack, to the ``peer``'s same method and to ``peer_lora``: for each of ``seconds`` the
    same four (``least`` is the ratio of the least values), for each count of bytes a number, ``null`` where the other
    has none;

- ``summary``, without PEFT ``null``: ``compared``, how many contestants both sides have; ``speed_up``, for each of
  ``seconds`` the geometric mean of Hugging Face PEFT's time over ours; ``bytes``, for each count the geometric mean of
  PEFT's over ours, where both have some; ``worse``, each ``method`` and ``quantity`` (bytes from half a percent on,
  times except ``forward`` and ``backward``, which the step tells) in which we take more than PEFT, with the
  ``ratio``'s ``median``, ``low``, ``high`` and ``least``, and ``clear`` where the lower quartile is above 1.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import PeanutError
from ..files import make_folder
from ..protocols import METHODS
from ..training.terminal import quiet
from .bench_report import print_tables, write_report
from .bench_rows import Row
from .measure import interleaved, within_memory
from .model_variants import batch_of, frozen_model, model_configs, model_variants
from .settings import STACKS, Settings, settings_of
from .storage import file_bytes, life_probe
from .variants import Variant, configs_of, frozen_stack, peer_version, twin, variants_of

__all__ = ["Settings", "main", "measure"]

LIVES = 5
"""The most rounds of injecting, saving and loading."""
PATIENCE = 60.0
"""Seconds after which a variant sits out the remaining rounds: some of PEFT's take minutes for a few tokens."""


def measure(settings: Settings) -> list[Row]:
    """Builds and measures every variant; the frozen stack's row comes first.

    Raises:
        PeanutError: a method's output differs from Hugging Face PEFT's, so that a comparison would mean nothing.
    """
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"peft\.")  # about configs that are measured as they are
        warnings.filterwarnings("ignore", message=".*returned no loss")  # of penalties, on plain layers
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")  # what PEFT calls
        variants, x, target = built(settings, Path(folder))
        rows: list[Row] = []
        with _progress("memory", len(variants)) as advance:
            for variant in list(variants):
                row = _row(variant, x, target, rows[0].saved_bytes if rows else 0)
                if row is None:
                    variants.remove(variant)
                    rows[-1].note = f"peft {peer_version()} wants more memory than is free"
                else:
                    rows.append(row)
                del variant
                advance()
        inference = STACKS[settings.stack].inference
        one = x.detach()[:, :1].clone() if inference == "token" else x
        device, repeats = torch.device(settings.device), settings.repeats
        steps: list[Probe] = [functools.partial(variant.step, x, target) for variant in variants]
        _rounds(rows, "steps", steps, repeats)
        _rounds(rows, inference, [variant.evaluation_probe(inference, one) for variant in variants], repeats)
        living = [
            (row, life_probe(variant, variant.life, device))
            for row, variant in zip(rows, variants, strict=True)
            if variant.life is not None and row.file_bytes is not None
        ]
        _rounds([row for row, _ in living], "files", [probe for _, probe in living], min(repeats, LIVES))
    return rows


Probe = Callable[[], Mapping[str, float]]


def built(settings: Settings, folder: Path) -> tuple[list[Variant], Tensor, Tensor]:
    """The variants, and what a training step is given: the input, and the output's gradient or the labels.

    Args:
        settings: what is measured.
        folder: where a mixture's experts are written; it has to stay while the variants are measured.
    """
    device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
    if settings.stack == "layers":
        narrow, wide = settings.dims
        generator = torch.Generator().manual_seed(0)
        x, grad = (torch.randn(1, settings.tokens, narrow, generator=generator).to(device, dtype) for _ in range(2))
        on = STACKS["layers"].trial([(narrow, wide)])
        configs = configs_of(settings.methods or (), settings.rank, settings.depth, on)
        stack = frozen_stack(narrow, wide, settings.blocks, device, dtype)
        x.requires_grad_()
        return variants_of(configs, functools.partial(twin, stack), x), x, grad
    ids, labels = batch_of(settings, device)
    model = frozen_model(settings, device, dtype)
    build = functools.partial(twin, model)
    return model_variants(model_configs(settings, model), build, ids, folder), ids, labels


def _row(variant: Variant, x: Tensor, target: Tensor, frozen: int) -> Row | None:
    """What does not depend on other work on the machine, bytes and parameters; ``None`` if PEFT lacks memory."""
    row = Row(variant.method, variant.by, variant.trained_parameters, difference=variant.difference, note=variant.note)
    gc.collect()  # what a variant before it left is not to count as taken, least of all after it ran out of memory
    try:
        with within_memory():
            variant.step(x, target)  # warm-up: the optimiser's state and the libraries' scratch memory are made here
            row.saved_bytes = variant.saved_bytes(x) - frozen
            row.peak_bytes = variant.peak_bytes(x, target)
            row.evaluation_bytes = variant.evaluation_bytes(x)
    except RuntimeError as error:
        if variant.by != "peft" or not ("allocate memory" in str(error) or isinstance(error, torch.OutOfMemoryError)):
            raise
        return None
    if variant.life is not None:
        try:
            life_probe(variant, variant.life, x.device)()
            row.file_bytes = file_bytes(variant)
        except Exception as error:
            if variant.by != "peft":
                raise
            row.note = f"it cannot be saved and loaded: {str(error).splitlines()[0]}"
    return row


def _rounds(rows: Sequence[Row], text: str, probes: Sequence[Probe], repeats: int) -> None:
    """Runs probes, interleaved, and puts what each found into its row."""
    with _progress(text, len(probes) * repeats) as advance:

        def watched(probe: Probe) -> Probe:
            spent = 0.0

            def call() -> Mapping[str, float]:
                nonlocal spent
                start = time.perf_counter()
                found = probe() if spent < PATIENCE else {}
                spent += time.perf_counter() - start
                advance()
                return found

            return call

        found = interleaved([watched(probe) for probe in probes], range(repeats))
    for row, seconds in zip(rows, found, strict=True):
        row.seconds |= seconds
        rounds = len(next(iter(seconds.values())))
        if rounds < repeats:
            row.note = "; ".join(filter(None, [row.note, f"{text} in {rounds} of {repeats} rounds, being slow"]))


@contextmanager
def _progress(text: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error, and what advances it; it is drawn only then, never beside what is timed.

    There is none without ``rich``, nor in a file.
    """
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ModuleNotFoundError:
        yield lambda: None
        return
    console = Console(stderr=True)
    with Progress(console=console, auto_refresh=False, disable=not console.is_terminal) as progress:
        task = progress.add_task(text, total=total)

        def advance() -> None:
            progress.advance(task)
            progress.refresh()

        yield advance


def main(args: Sequence[str] | None = None) -> int:
    """``peanut bench``: measures, prints tables, writes JSON and a plot; the exit status."""
    options: dict[str, Any] = vars(_parser().parse_args(args))
    output = options.pop("output")
    before = torch.get_num_threads()
    try:
        settings = settings_of(**{name: value for name, value in options.items() if value is not None})
        quiet()
        make_folder(output)
        importlib.import_module("matplotlib")  # if it is missing, that is told now and not after minutes of measuring
        torch.set_num_threads(settings.threads)
        rows = measure(settings)
        print_tables(rows, settings)
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
        description="Measures what methods cost in layers or in a model: time, memory, files, one token of generation.",
        epilog="On a machine that does other work too, set OMP_WAIT_POLICY=passive in the environment.",
    )

    def option(name: str, text: str, kind: type = int, **more: object) -> None:
        usual = getattr(default, name)
        values = [
            f"{_told(own[name])} for {key}" for key, own in ((k, s.usual) for k, s in STACKS.items()) if name in own
        ]
        if name != "methods":
            text = f"{text} (default: {'; '.join([_told(usual), *values])})"
        parser.add_argument(f"--{name}", type=kind, help=text.replace("%", "%%"), **more)  # type: ignore[arg-type]

    styles = sorted(style for method in METHODS.values() for style, *_ in method.styles)
    about = "; ".join(f"{name}: {stack.about}" for name, stack in STACKS.items())
    option("stack", about, str, choices=tuple(STACKS))
    option(
        "methods",
        f"which, beside LoRA, the yardstick; {', '.join(styles)} too (default: all that the stack is for)",
        str,
        nargs="+",
        metavar="METHOD",
    )
    option("tokens", "tokens that a training step reads")
    option("rank", "r of the methods that have one")
    option("depth", "depths of the methods that have one", nargs="+")
    option("dims", "the stack's two widths", nargs=2, metavar=("NARROW", "WIDE"))
    option("blocks", "blocks: of two plain layers, or of the model")
    option("dtype", "of weights and activations", str, choices=("float32", "bfloat16", "float16", "float64"))
    option("device", "as torch names it", str)
    option("repeats", "rounds")
    option("threads", "of the CPU")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for JSON and plot")
    return parser


def _told(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


if __name__ == "__main__":
    sys.exit(main())
