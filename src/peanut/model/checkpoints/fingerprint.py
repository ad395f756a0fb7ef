"""Samples and digests of the base's frozen weights, saved with an adapter: loading it on another base is an error."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PeanutError, warn
from ...files import parse_json
from ...protocols.values import check_value
from ..adapters.adapter_set import AdapterSet
from .base_weights import (
    base_statistics,
    base_tensors,
    embedding_weights,
    has_other_vocabulary,
    is_sharded,
    rows_added,
    saved_module_paths,
    weights_moved_by_lookups,
)
from .digests import Digest, changed, digest_of

__all__ = ["FINGERPRINT", "OLD_FINGERPRINT", "check_base", "fingerprint", "recorded_rows"]

FINGERPRINT, OLD_FINGERPRINT = "peanut_base_values", "peanut_base"
"""Where a file's metadata has it; the second is of files that sampled the adapted layers only."""
_VALUES, _LAST_ROW, _PARAMETERS = 4, 8, 1024
_OLD_LAYERS, _OLD_VALUES = 16, 16

Samples = dict[str, list[float]]


@torch.no_grad()
def fingerprint(
    adapters: AdapterSet,
    name: str,
    saved: Collection[str] = (),
    state_dict: Mapping[str, Tensor] | None = None,
    *,
    new_rows_may_differ: bool = False,
) -> str | None:
    """JSON of the shape, a digest and a few values of every parameter of the base; of embeddings, their last row too.

    Rows that were added to an embedding are its last. The values are for a base in another precision, of which the
    digest says nothing. What has no plain values (the meta device, codes, shards) is left out, and so are the modules
    that adapter ``name`` trains whole, and embeddings with a ``max_norm``, which lookups change; ``None`` if nothing is
    left. Of very many parameters, some are sampled.

    Args:
        saved: parameters that the adapter's file holds.
        state_dict: the base's tensors by path, gathered, to take the values from.
        new_rows_may_differ: give rows that were added to embeddings no digest: they may have been made at random.
    """
    base, statistics = base_tensors(adapters), base_statistics(adapters)
    if state_dict and state_dict.keys() & base.keys():
        base, statistics = (
            {path: state_dict[path] for path in own if path in state_dict} for own in (base, statistics)
        )
    elif is_sharded(adapters.model):
        return None
    left_out, embeddings = tuple(f"{path}." for path in saved_module_paths(adapters, name)), embedding_weights(adapters)
    saved = {*saved, *weights_moved_by_lookups(adapters)}
    base, statistics = (
        {
            path: value
            for path, value in {id(value): (path, value) for path, value in reversed(own.items())}.values()
            if _has_values(value) and path not in saved and not path.startswith(left_out)
        }
        for own in (base, statistics)
    )
    step = max(1, -(-len(base) // _PARAMETERS))
    taken = {path: base[path] for number, path in enumerate(base) if number % step == 0 or path in embeddings}
    samples = _samples({path: (value, _shape(value, path in embeddings)) for path, value in taken.items()})
    shapes = {path: _shape(value, path in embeddings) for path, value in taken.items()}
    found = {path: [*shapes[path], *(float(f"{value:.5g}") for value in own)] for path, own in samples.items()}
    added = rows_added(adapters, name) if new_rows_may_differ else 0
    digests: dict[str, dict[str, str]] = {}
    for path, value in (base | statistics).items():
        own = value[:-added] if added > 0 and path in embeddings else value
        digests.setdefault(str(value.dtype).removeprefix("torch."), {})[path] = digest_of(own)
    record: dict[str, Any] = {"digests": digests, "values": found}
    record |= {"shrunk": True} if added < 0 else {"added": added} if added > 0 else {}
    return json.dumps(record, sort_keys=True, separators=(",", ":")) if found else None


@torch.no_grad()
def check_base(adapters: AdapterSet, name: str, recorded: str | None, trained_on: str | None) -> None:
    """Compares the base under adapter ``name`` with the fingerprint that its file records, if it does.

    A sampled value may differ by what rounding to bfloat16 explains, 2⁻⁷ of it. Parameters that this base does not have
    are passed over, and so are rows that its embeddings have beyond those recorded, with a warning if they were not
    added here, and an error if they had been taken away. What transformers has made at random, as the base's files lack
    it, is a warning where it may not be used: inside the base (a pooler), neither on top of it nor where the adapter
    is. So are a norm's statistics, which follow the training.

    Raises:
        PeanutError: the weights differ by more.
    """
    if not recorded:
        return
    what = "the recorded fingerprint of the base"
    read = parse_json(recorded, what)
    new = isinstance(read, dict) and "values" in read
    samples = check_value(what, dict[str, list[float]], read["values"] if new else read)
    sharded = is_sharded(adapters.model)
    base, statistics = ({}, {}) if sharded else (base_tensors(adapters), base_statistics(adapters))
    then, now = _of_base(base, samples) if new else _of_layers(adapters, name, samples)
    differing = {path for path in then if path not in now or _apart(then[path], now[path])}
    digests = _digests(what, read.get("digests", {}) if new else {})
    added = check_value(what, int, read.get("added", 0)) if new else 0
    exact = {
        path: _first_rows(value, *(rows - added for rows in samples.get(path, ())[1:2]))
        for path, value in (base | statistics).items()
        if path in digests and path not in differing and _has_values(value)
    }
    changes = changed(exact, digests)
    apart = sorted((differing | changes) - statistics.keys())
    adapted = {place.path for place in adapters.places(name)}
    random = [path for path in _made_at_random(adapters, apart, base) if path.rpartition(".")[0] not in adapted]
    others = sorted({*apart} - {*random})
    if others:
        here = getattr(getattr(adapters.model, "config", None), "_name_or_path", None) or type(adapters.model).__name__
        more = f" and {len(others) - 1} more differ" if len(others) > 1 else " differs"
        resized = embedding_weights(adapters) & set(others)
        weights = (
            _short([then, [digests[path][1] for path in sorted(changes)]]),
            _short([now, [digest_of(exact[path]) for path in sorted(changes)]]),
        )
        raise PeanutError(
            f"the adapter was trained on '{trained_on or 'another model'}' (weights {weights[0]}) and this base is "
            f"'{here}' (weights {weights[1]}): '{others[0]}'{more}",
            "the base that it was trained on",
            f"load that one, {'save the adapter with save_embedding_layers=True, ' if resized else ''}"
            "or pass check_base=False",
        )
    if random:
        warn(
            f"'{random[0]}' was made at random, as the base's files lack it, and is another than when the adapter was "
            "trained: its answers are right only if the model does not use it"
        )
    if following := sorted(changes & statistics.keys()):
        warn(
            f"'{following[0]}' is another than when the adapter was saved, as statistics follow a training in train() "
            f"mode: train with '{following[0].rpartition('.')[0]}' in eval(), or in modules_to_save"
        )
    embeddings = sorted(embedding_weights(adapters) & then.keys())
    longer = next((path for path in embeddings if _rows(base[path]) > int(then[path][1])), None)
    if longer is not None and not has_other_vocabulary(adapters, name):
        rows = int(then[longer][1])
        found = f"'{longer}' has {_rows(base[longer])} rows here and had {rows} when the adapter was trained"
        call = f"call resize_token_embeddings({rows}) first"
        if new and "shrunk" in read:
            raise PeanutError(f"{found}, as its vocabulary was shrunk", f"{rows}", f"{call}, or pass check_base=False")
        warn(f"{found}, so it answers over other tokens; {call} if they were not added since")


def _digests(what: str, read: Any) -> dict[str, Digest]:
    """The digests that a file records, by path."""
    by_dtype = check_value(what, dict[str, dict[str, str]], read)
    return {
        path: (dtype, own)
        for name, digests in by_dtype.items()
        if isinstance(dtype := getattr(torch, name, None), torch.dtype)
        for path, own in digests.items()
    }


def recorded_rows(recorded: str | None) -> dict[str, int]:
    """How many rows the base's embeddings had when an adapter was saved, by path, if its file says so."""
    what = "the recorded fingerprint of the base"
    read = parse_json(recorded, what) if recorded else {}
    values = read.get("values", {}) if isinstance(read, dict) else {}
    samples = check_value(what, dict[str, list[float]], values)
    return {path: int(own[1]) for path, own in samples.items() if len(own) > 1 and own[1] > 0}


def _first_rows(value: Tensor, rows: float = 0) -> Tensor:
    """The rows of an embedding that it had already, as ``_fits`` has found; other parameters as they are."""
    return value[: int(rows)] if 0 < rows < _rows(value) else value


def _rows(value: Tensor) -> int:
    return len(value) if value.dim() == 2 else 0


def _of_base(base: Mapping[str, Tensor], recorded: Mapping[str, list[float]]) -> tuple[Samples, Samples]:
    """What a file records of the base's parameters, and the same of the base at hand where that has them."""
    there = {path: value for path, value in base.items() if path in recorded and _has_values(value)}
    then = {path: recorded[path] for path in there}
    shapes = {path: (int(values[0]), int(values[1])) for path, values in then.items() if len(values) >= 2}
    fitting = {path: (there[path], shape) for path, shape in shapes.items() if _fits(there[path], *shape)}
    return then, {path: [*shapes[path], *values] for path, values in _samples(fitting).items()}


def _shape(value: Tensor, embedding: bool) -> tuple[int, int]:
    """How many values a parameter has; and how many rows, if it is an embedding, else 0."""
    return value.numel(), _rows(value) if embedding else 0


def _fits(value: Tensor, size: int, rows: int) -> bool:
    """Whether a parameter has the shape that was recorded, or is an embedding with more rows."""
    if rows and not (0 < rows <= size and size % rows == 0):
        return False
    more = rows > 0 and value.dim() == 2 and len(value) > rows and value.shape[1] * rows == size
    return value.numel() == size or more


def _samples(parameters: Mapping[str, tuple[Tensor, tuple[int, int]]]) -> Samples:
    """Values of the parameters as they had the shapes; read with one transfer for each device."""
    parts: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for path, (value, (size, rows)) in parameters.items():
        own = value if value.is_contiguous() else value.contiguous()
        own_parts = parts.setdefault(value.device, [])
        own_parts.append((path, _spread(own, 0, size, _VALUES)))
        if rows:
            own_parts.append((path, _spread(own, size - size // rows, size, _LAST_ROW)))
    samples: Samples = {}
    for found in parts.values():
        values = iter(torch.cat([part for _, part in found]).tolist())
        for path, part in found:
            samples.setdefault(path, []).extend(islice(values, len(part)))
    return samples


def _spread(value: Tensor, first: int, end: int, most: int) -> Tensor:
    """Up to ``most`` values of a contiguous tensor from ``first`` to ``end``, the last of them included."""
    count = min(most, end - first)
    step = (end - first - 1) // max(1, count - 1)
    return value.as_strided((count,), (step,), value.storage_offset() + end - 1 - step * (count - 1))


def _has_values(value: Tensor) -> bool:
    """Whether a parameter is a plain tensor of numbers, not codes, a shard, or without storage."""
    plain = type(value) in (Tensor, nn.Parameter) and value.is_floating_point() and value.element_size() > 1
    return plain and value.numel() > 0 and not value.is_meta and not hasattr(value, "_fsdp_flattened")


def _made_at_random(adapters: AdapterSet, paths: Sequence[str], base: Mapping[str, Tensor]) -> list[str]:
    """Which of ``paths`` are in modules inside the base that transformers made: it marks what it found in a file."""
    read = {path.rpartition(".")[0] for path, value in base.items() if getattr(value, "_is_hf_initialized", False)}
    model, inside = adapters.model, f"{getattr(adapters.model, 'base_model_prefix', '')}."
    if not paths or not read:
        return []
    embeddings = embedding_weights(adapters)
    return [
        path
        for path in paths
        if path in base
        and path not in embeddings
        and path.rpartition(".")[0] not in read
        and (path.startswith(inside) or not hasattr(model, inside[:-1]))
    ]


def _of_layers(adapters: AdapterSet, name: str, recorded: Samples) -> tuple[Samples, Samples]:
    """What an older file records, up to 16 values of up to 16 adapted layers, and the same of the base at hand."""
    layers = list(adapters.layers(name))
    samples: Samples = {}
    for path, layer in layers[:: max(1, len(layers) // _OLD_LAYERS)][:_OLD_LAYERS]:
        frozen, weight = layer.frozen, layer.frozen.weight
        if frozen.kind.quantised or frozen.unreadable(weight) is not None or weight.is_meta:
            return {}, {}
        flat = weight.reshape(-1)
        places = torch.linspace(0, flat.numel() - 1, min(_OLD_VALUES, flat.numel()), dtype=torch.float64).round().long()
        samples[path] = [float(f"{value:.6g}") for value in flat[places.to(flat.device)].double().tolist()]
    return {**{path: [] for path in samples}, **recorded} if samples else {}, samples


def _apart(a: list[float], b: list[float]) -> bool:
    return len(a) != len(b) or any(abs(x - y) > 2**-7 * max(abs(x), abs(y)) + 1e-6 for x, y in zip(a, b, strict=True))


def _short(samples: Any) -> str:
    return hashlib.sha256(json.dumps(samples, sort_keys=True).encode()).hexdigest()[:8]
