"""``python -m benchmarks.startup``: time to import the library, to add adapters to a large model, and to load one.

Seconds to import the library (torch not counted), to put adapters on every linear layer of a Llama of 7B parameters on
the meta device, and to load an adapter of 100 MB, beside reading the file's tensors alone; each by Hugging Face PEFT
too, where it is installed, in turn. Medians, with the least and the largest value.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peanut import __version__
from peanut.errors import PeanutError
from peanut.files import write_json
from peanut.lab.measure import interleaved, now, processor
from peanut.lab.variants import peer_version
from peanut.methods.lora import LoraConfig
from peanut.methods.peanut import PeanutConfig
from peanut.model.peft_model import PeftModel, get_peft_model
from peanut.training.terminal import quiet

__all__ = ["main"]

SEVEN_B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
SMALL = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16}
RANK_OF_100_MB = 53  # on SMALL, in float32
IMPORTS = {
    "import peanut": "import peanut",
    "import, a config, get_peft_model": "import peanut; peanut.LoraConfig(target_modules=['q']), peanut.get_peft_model",
    "import peft": "import peft",
}
CPU = torch.device("cpu")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, writes JSON; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for the JSON file")
    options = parser.parse_args(arguments)
    name = f"startup-{__version__}-{processor(CPU).lower().replace(' ', '-')}-{torch.get_num_threads()}t.json"
    try:
        quiet()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Hugging Face PEFT's, about a base on the meta device
            seconds = {"import": _imports(options.repeats), "inject into 7B": _injections(options.repeats)}
            seconds["load 100 MB"] = _loads(options.repeats)
        versions = {"peanut": __version__, "torch": str(torch.__version__), "peft": peer_version()}
        write_json(options.output / name, {"versions": versions, "hardware": processor(CPU), "seconds": seconds})
    except PeanutError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for what, found in seconds.items():
        for which, (least, median, most) in found.items():
            print(f"{what:16} {which:34} {median:7.3f} s  ({least:.3f} to {most:.3f})")
    print(options.output / name)
    return 0


def _spreads(probes: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Least, median and largest seconds of each probe, run in turn; what has adapters gives them up afterwards."""

    def timed(probe: Callable[[], object]) -> Callable[[], dict[str, float]]:
        def once() -> dict[str, float]:
            start = now(CPU)
            made: Any = probe()
            took = now(CPU) - start
            if hasattr(made, "unload"):
                made.unload()
            return {"seconds": took}

        return once

    found = interleaved([timed(probe) for probe in probes.values()], range(rounds))
    values = [sorted(each["seconds"]) for each in found]
    return {name: [own[0], own[len(own) // 2], own[-1]] for name, own in zip(probes, values, strict=True)}


def _imports(rounds: int) -> dict[str, list[float]]:
    """Each in a process of its own that has imported torch, by that process's clock."""
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, statement in IMPORTS.items():
            if name == "import peft" and peer_version() is None:
                continue
            code = f"import time, torch; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True
            )
            found.setdefault(name, []).append(float(done.stdout.split()[-1]))
    values = {name: sorted(own) for name, own in found.items()}
    return {name: [own[0], own[len(own) // 2], own[-1]] for name, own in values.items()}


def _injections(rounds: int) -> dict[str, list[float]]:
    def ours(config: Any) -> Callable[[], object]:
        return lambda: get_peft_model(_llama(SEVEN_B, "meta"), config)

    options: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    probes: dict[str, Callable[[], object]] = {
        "the model alone": lambda: _llama(SEVEN_B, "meta"),
        "with LoRA": ours(LoraConfig(r=16, **options)),
        "with PEANuT": ours(PeanutConfig(r=16, **options)),
    }
    if peer_version() is not None:
        peft: Any = importlib.import_module("peft")
        probes["with LoRA by peft"] = lambda: peft.get_peft_model(
            _llama(SEVEN_B, "meta"), peft.LoraConfig(r=16, **options), low_cpu_mem_usage=True
        )
    return _spreads(probes, rounds)


def _loads(rounds: int) -> dict[str, list[float]]:
    from safetensors.torch import load_file

    base = _llama(SMALL, "cpu")
    config = LoraConfig(r=RANK_OF_100_MB, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        made = get_peft_model(base, config)
        made.save_pretrained(folder)
        made.unload()
        file = Path(folder, "adapter_model.safetensors")
        print(f"the adapter has {file.stat().st_size / 1e6:.0f} MB", file=sys.stderr)

        def read() -> list[torch.Tensor]:
            return [tensor.clone() for tensor in load_file(file).values()]

        probes: dict[str, Callable[[], object]] = {
            "reading the file's tensors": read,
            "peanut": lambda: PeftModel.from_pretrained(base, folder),
        }
        if peer_version() is not None:
            peft: Any = importlib.import_module("peft")
            probes["peft"] = lambda: peft.PeftModel.from_pretrained(base, folder)
        return _spreads(probes, rounds)


def _llama(shape: dict[str, int], device: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device(device):
        settings: Any = shape
        made: nn.Module = LlamaForCausalLM(LlamaConfig(vocab_size=32000 if device == "meta" else 1000, **settings))
        return made


if __name__ == "__main__":
    sys.exit(main())
