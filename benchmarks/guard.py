"""``python -m benchmarks.guard``: checks that no method has become slower or uses more memory.

Some methods on one small block, beside the frozen block and PEFT. What is judged are ratios, never seconds: of a
training step and of one token in evaluation to the frozen block's and to PEFT's, and of the bytes kept for the
backward to PEFT's. Each has a bound in a file, with room for noise; what misses its bound is measured again with
more rounds before it counts.
"""

from __future__ import annotations

import argparse
import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from peanut.errors import PeanutError
from peanut.files import read_json, write_json
from peanut.lab.measure import interleaved, ratio
from peanut.lab.variants import Variant, configs_of, frozen_stack, peer_version, twin, variants_of
from peanut.protocols import FORMAT_VERSION, Trial
from peanut.training.terminal import quiet

__all__ = ["main"]

METHODS = ("C3A", "DORA", "FOURIERFT", "HRA", "LORA", "OFT", "PEANUT", "SHIRA", "VERA")
DEPTHS, RANK = (0, 2), 16
NARROW, WIDE, TOKENS = 256, 1024, 512
EVALUATED = ("FOURIERFT", "HRA", "OFT", "PEANUT")
"""The methods whose token in evaluation is judged: what they compute beforehand must stay computed."""
ROUNDS, ATTEMPTS = 10, 3
ROOM = {"step": 1.5, "token": 1.5, "kept": 1.02}
"""How much more than what was found a bound allows: times are noisy, bytes are exact but for what torch may add."""

Found = dict[str, dict[str, float]]
"""Case → quantity (``step ÷ peer``) → ratio."""


class Block:
    """The variants of the block, ready to be measured.

    Args:
        names: which methods; frozen, ours and Hugging Face PEFT's of each are built.
    """

    def __init__(self, names: Sequence[str] = METHODS) -> None:
        cpu = torch.device("cpu")
        generator = torch.Generator().manual_seed(0)
        self.x, self.grad = (torch.randn(1, TOKENS, NARROW, generator=generator) for _ in range(2))
        self.token = self.x[:, :1].clone()
        self.x.requires_grad_()
        stack = frozen_stack(NARROW, WIDE, 1, cpu, torch.float32)
        configs = configs_of(names, RANK, DEPTHS, Trial(shapes=[(NARROW, WIDE)]))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"peft\.")  # about sparse tensors, which are as it wants them
            variants = variants_of(configs, functools.partial(twin, stack), self.x)
        self.variants: dict[tuple[str, str], Variant] = {(each.method, each.by): each for each in variants}
        self.cases = tuple(configs)

    def kept(self) -> Found:
        """The bytes that each case keeps for the backward, to Hugging Face PEFT's where Hugging Face PEFT keeps any."""
        found = {}
        for case in self.cases:
            ours, theirs = (self.variants[case, by].saved_bytes(self.x) for by in ("peanut", "peft"))
            found[case] = {"kept ÷ peer": ours / theirs} if theirs else {}
        return found

    def times(self, cases: Iterable[str], rounds: int, pick: Callable[[Sequence[float]], float]) -> Found:
        """Ratios of steps, and of tokens where they are judged.

        Args:
            cases: which.
            rounds: in which every variant is measured once.
            pick: chooses between the median of the rounds' ratios and the ratio of the least times.
        """
        cases = tuple(cases)
        evaluated = [case for case in cases if case.startswith(EVALUATED)]
        steps = self._seconds(cases, rounds, lambda variant: functools.partial(variant.step, self.x, self.grad))
        tokens = self._seconds(evaluated, rounds, lambda variant: variant.token_probe(self.token))
        found: Found = {case: {} for case in cases}
        for quantity, seconds in (("step", steps), ("token", tokens)):
            for case in cases if quantity == "step" else evaluated:
                for name, reference in (("frozen", ("", "frozen")), ("peer", (case, "peft"))):
                    spread = ratio(seconds[case, "peanut"][quantity], seconds[reference][quantity])
                    found[case][f"{quantity} ÷ {name}"] = pick((spread.median, spread.least))
        return found

    def _seconds(
        self, cases: Iterable[str], rounds: int, probe: Callable[[Variant], Callable[[], Mapping[str, float]]]
    ) -> dict[tuple[str, str], dict[str, list[float]]]:
        keys = [("", "frozen"), *((case, by) for case in cases for by in ("peanut", "peft"))]
        probes = [probe(self.variants[key]) for key in keys]
        for each in probes:
            each()  # warm-up
        return dict(zip(keys, interleaved(probes, range(rounds)), strict=True))


def quantities(case: str) -> list[str]:
    """The ratios of times that are judged of a case."""
    names = ("step", "token") if case.startswith(EVALUATED) else ("step",)
    return [f"{name} ÷ {reference}" for name in names for reference in ("frozen", "peer")]


def judged(block: Block, kept: Found, bounds: Found) -> Found:
    """The ratios of all cases; those of a case that misses a bound are the least of all attempts."""
    found = {case: dict(own) for case, own in kept.items()}
    todo: Sequence[str] = block.cases
    for attempt in range(ATTEMPTS):
        for case, own in block.times(todo, ROUNDS * 2**attempt, min).items():
            found[case] |= {name: min(value, found[case].get(name, value)) for name, value in own.items()}
        todo = [case for case in block.cases if any(_over(found, bounds, case, name) for name in found[case])]
        if not todo:
            break
    return found


def _over(found: Found, bounds: Found, case: str, name: str) -> bool:
    return found[case][name] > bounds[case][name]


def main(args: Sequence[str] | None = None) -> int:
    """Measures and judges; the exit status: 1 if something misses its bound, 2 for a wrong call."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guard", description=__doc__.splitlines()[0])
    parser.add_argument("--bounds", type=Path, default=Path("results/guard.json"), help="the file of bounds")
    parser.add_argument("--update", action="store_true", help="write that file from what is measured now, with room")
    options = parser.parse_args(args)
    before = torch.get_num_threads()
    quiet()
    try:
        torch.set_num_threads(1)  # two threads that wait for each other are most of the noise
        if peer_version() is None:
            raise PeanutError("PEFT is not installed", "the package peft", f"pip install peft=={FORMAT_VERSION}")
        if options.update:
            write_json(options.bounds, updated(Block()))
            print(options.bounds)
            return 0
        bounds = read_bounds(options.bounds)
        block = Block()
        kept = block.kept()
        _check_cases({case: {*own, *quantities(case)} for case, own in kept.items()}, bounds, options.bounds)
        found = judged(block, kept, bounds)
    except PeanutError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(before)
    print_table(found, bounds)
    misses = [(case, name) for case in found for name in found[case] if _over(found, bounds, case, name)]
    for case, name in misses:
        print(f"error: {_miss(case, name, found[case][name], bounds[case][name])}", file=sys.stderr)
    return 1 if misses else 0


def _miss(case: str, name: str, value: float, bound: float) -> PeanutError:
    return PeanutError(
        f"{case}: {name} is {value:.3g}",
        f"at most {bound:.3g}",
        "find what made it so, or, if it has to be, run python -m benchmarks.guard --update and say why",
    )


def updated(block: Block) -> dict[str, Any]:
    """What the file of bounds is to hold: what is found now, with room, and what was measured."""
    found = block.kept()
    for case, own in block.times(block.cases, 3 * ROUNDS, max).items():
        found[case] |= own
    return {
        "block": f"{NARROW} to {WIDE} to {NARROW}, {TOKENS} tokens, r {RANK}, float32, one thread",
        "room": ROOM,
        "bounds": {
            case: {name: float(f"{value * ROOM[name.split()[0]]:.4g}") for name, value in own.items()}
            for case, own in found.items()
        },
    }


def read_bounds(path: Path) -> Found:
    """The bounds in a file.

    Raises:
        PeanutError: it is missing, or holds something else.
    """
    bounds = read_json(path).get("bounds")
    if not isinstance(bounds, dict) or not all(
        isinstance(own, dict) and all(isinstance(value, float | int) for value in own.values())
        for own in bounds.values()
    ):
        raise PeanutError(f"no bounds in '{path}'", "case → quantity → number", "make it with --update")
    return bounds


def _check_cases(wanted: Mapping[str, set[str]], bounds: Found, path: Path) -> None:
    """Nothing goes unjudged because its bound is missing, and no bound because its case is gone."""
    for case in sorted({*wanted, *bounds}):
        names, own = wanted.get(case), set(bounds.get(case, {}))
        if own != names or case not in bounds:
            raise PeanutError(
                f"'{path}' bounds {', '.join(sorted(own)) or 'nothing'} of {case}",
                ", ".join(sorted(names or ())) or "no such case",
                "write the file again: python -m benchmarks.guard --update",
            )


def print_table(found: Found, bounds: Found) -> None:
    """Prints each ratio beside its bound; a miss is marked."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    names = list(dict.fromkeys(name for own in found.values() for name in own))
    table = Table("", title="found / bound", title_justify="left", box=SIMPLE_HEAD, padding=0)
    for name in names:
        table.add_column(name, justify="right")
    for case, own in found.items():
        cells = [
            f"{own[name]:.3g}/{bounds[case][name]:.3g}{'!' if _over(found, bounds, case, name) else ' '}"
            if name in own
            else ""
            for name in names
        ]
        table.add_row(case, *cells)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
