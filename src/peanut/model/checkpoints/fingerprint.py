"""Samples of the base's frozen weights, saved with an adapter, so that loading it on another base is an error."""

from __future__ import annotations

import hashlib
import json

import torch

from ...errors import PeanutError
from ...files import parse_json
from ...protocols.values import check_value
from ..adapters.adapter_set import AdapterSet

__all__ = ["check_base", "fingerprint"]

_LAYERS, _VALUES = 16, 16


@torch.no_grad()
def fingerprint(adapters: AdapterSet, name: str) -> str | None:
    """JSON of samples of the weights under adapter ``name``: up to 16 values of up to 16 layers, evenly spread.

    Values, not a hash: the same base in another precision must be recognised. ``None`` on the meta device, and
    where no layer is adapted.
    """
    layers = list(adapters.layers(name))
    step = max(1, len(layers) // _LAYERS)
    samples: dict[str, list[float]] = {}
    for path, layer in layers[::step][:_LAYERS]:
        frozen, weight = layer.frozen, layer.frozen.weight
        if frozen.kind.quantised or frozen.unreadable(weight) is not None or weight.is_meta:
            return None
        flat = weight.reshape(-1)
        places = torch.linspace(0, flat.numel() - 1, min(_VALUES, flat.numel()), dtype=torch.float64).round().long()
        samples[path] = [float(f"{value:.6g}") for value in flat[places.to(flat.device)].double().tolist()]
    return json.dumps(samples, sort_keys=True) if samples else None


def check_base(adapters: AdapterSet, name: str, recorded: str | None, trained_on: str | None) -> None:
    """Compares the base under adapter ``name`` with the fingerprint that its file records, if it does.

    A value may differ by what rounding to bfloat16 explains, 2⁻⁷ of it.

    Raises:
        PeanutError: the weights differ by more.
    """
    own = fingerprint(adapters, name)
    if not recorded or own is None:
        return
    now = json.loads(own)
    then = check_value("the recorded fingerprint of the base", dict[str, list[float]], parse_json(recorded, "it"))
    if then.keys() != now.keys() or any(_apart(then[path], now[path]) for path in then):
        here = getattr(getattr(adapters.model, "config", None), "_name_or_path", None) or type(adapters.model).__name__
        raise PeanutError(
            f"the adapter was trained on '{trained_on or 'another model'}' (weights {_short(recorded)}) "
            f"and this base is '{here}' (weights {_short(own)})",
            "the base that it was trained on",
            "load that one, or pass check_base=False",
        )


def _apart(a: list[float], b: list[float]) -> bool:
    return len(a) != len(b) or any(abs(x - y) > 2**-7 * max(abs(x), abs(y)) + 1e-6 for x, y in zip(a, b, strict=True))


def _short(samples: str) -> str:
    return hashlib.sha256(samples.encode()).hexdigest()[:8]
