"""Writes the reference values of this folder: what the packages ``adapters`` and ``pyreft`` compute on tiny models.

Runs in an environment of its own, never in ours, for ``adapters`` needs an older transformers:

    python make_references.py adapters    # adapters 1.3.0, transformers 4.57.6, torch 2.13.0
    python make_references.py pyreft      # pyreft 0.1.0, pyvene 0.1.8, transformers 4.45.1, torch 2.13.0

README.md of this folder says how to make these environments. All numbers are float32, made on one thread. The weights
of a base model come from the names and shapes of its tensors alone, so every version of transformers gives the same.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FOLDER = Path(__file__).parent
SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
BASES: dict[str, dict[str, Any]] = {
    "bert": {
        "model_class": "BertModel",
        "config_class": "BertConfig",
        "config": {**SIZES, "max_position_embeddings": 32},
        "arguments": {"add_pooling_layer": False},
    },
    "llama": {
        "model_class": "LlamaForCausalLM",
        "config_class": "LlamaConfig",
        "config": {**SIZES, "max_position_embeddings": 32, "num_key_value_heads": 2, "pad_token_id": 0},
        "arguments": {},
    },
    "roberta": {
        "model_class": "RobertaForSequenceClassification",
        "config_class": "RobertaConfig",
        "config": {**SIZES, "max_position_embeddings": 34, "type_vocab_size": 1, "pad_token_id": 1, "num_labels": 3},
        "arguments": {},
    },
}
LENGTHS = (9, 6, 3)
"""Tokens of each row of a batch; the rest is padding."""


@dataclass(frozen=True)
class Case:
    """One file: an adapter of ``package`` on ``base``."""

    name: str
    base: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    padding: str = "right"

    @property
    def package(self) -> str:
        return self.name.split("_")[0]


def bottlenecks(base: str) -> Iterable[Case]:
    """The three places with the package's default scaling and with another one."""
    for place, kind, first, second in (
        ("houlsby", "double_seq_bn", ("swish" if base == "llama" else "gelu", 1.0), ("relu", 0.5)),
        ("pfeiffer", "seq_bn", ("relu", 1.0), ("gelu", 2.0)),
        ("parallel", "par_bn", ("relu", 4.0), ("gelu", 1.0)),
    ):
        for suffix, (act, scaling) in (("", first), ("_scaled", second)):
            options = {"non_linearity": act, "scaling": scaling, "reduction_factor": 4}
            yield Case(f"adapters_{place}_{base}{suffix}", base, kind, options)


ENDS = {"prefix_positions": 2, "suffix_positions": 2, "r": 4, "dropout": 0.0}
CASES = [
    *bottlenecks("bert"),
    *bottlenecks("llama"),
    Case("adapters_loreft_bert", "bert", "loreft", ENDS),
    Case("adapters_noreft_bert", "bert", "noreft", {**ENDS, "non_linearity": "gelu"}),
    Case("adapters_loreft_llama_tied", "llama", "loreft", {**ENDS, "tied_weights": True}, padding="left"),
    Case("adapters_direft_llama", "llama", "direft", ENDS),
    Case("pyreft_loreft_llama", "llama", "LoreftIntervention", {"share_weights": False}),
    Case("pyreft_loreft_llama_shared", "llama", "LoreftIntervention", {"share_weights": True, "act_fn": "gelu"}),
    Case("pyreft_direft_llama", "llama", "DireftIntervention", {"share_weights": False}),
    Case("pyreft_direft_llama_shared", "llama", "DireftIntervention", {"share_weights": True, "act_fn": "relu"}),
    Case("pyreft_noreft_llama", "llama", "NoreftIntervention", {"share_weights": False, "add_bias": True}),
    Case("pyreft_loreft_roberta", "roberta", "LoreftIntervention", {"share_weights": False}),
    Case("pyreft_direft_roberta", "roberta", "DireftIntervention", {"share_weights": False, "act_fn": "gelu"}),
]


def base_model(name: str) -> nn.Module:
    """A base model, and its file where there is none yet; an existing file must hold the same weights."""
    made = BASES[name]
    config = getattr(transformers, made["config_class"])(**made["config"])
    model = getattr(transformers, made["model_class"])(config, **made["arguments"]).eval()
    generator = torch.Generator().manual_seed(20)
    for key, value in sorted(model.state_dict().items()):
        noise = torch.randn(value.shape, generator=generator)
        if value.dim() == 1:
            value.copy_(0.1 * noise + (1.0 if key.lower().endswith("norm.weight") else 0.0))
        else:
            value.copy_(noise / value.shape[-1] ** 0.5)
    path = FOLDER / f"base_{name}.safetensors"
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    if not path.exists():
        save_file(state, path, {"model": json.dumps(made, sort_keys=True)})
        path.chmod(0o644)
    found = load_file(path)
    if found.keys() != state.keys() or not all(torch.equal(found[key], state[key]) for key in state):
        raise SystemExit(f"{path.name}: not the weights made here; delete it and all files that start from it")
    return model


def batch(case: Case) -> dict[str, Tensor]:
    """Rows of three lengths with padding; ids 0, 1 and 2 are left to padding and special tokens."""
    generator = torch.Generator().manual_seed(21)
    pad = BASES[case.base]["config"].get("pad_token_id", 0)
    ids, mask = torch.full((len(LENGTHS), max(LENGTHS)), pad), torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        place = slice(-length, None) if case.padding == "left" else slice(0, length)
        ids[row, place] = torch.randint(3, SIZES["vocab_size"], (length,), generator=generator)
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def result(output: Any) -> Tensor:
    """What is compared: logits where the model has them."""
    return output.logits if "logits" in output else output.last_hidden_state


def scatter(module: nn.Module, generator: torch.Generator) -> None:
    """Random values of clear size, no zero start; orthogonal matrices stay orthogonal."""
    orthogonal = {id(p) for m in module.modules() if hasattr(m, "parametrizations") for p in m.parameters()}
    for parameter in module.parameters():
        if id(parameter) not in orthogonal:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    for part in module.modules():
        if hasattr(part, "parametrizations"):
            rows, columns = part.weight.shape
            noise = torch.randn(max(rows, columns), min(rows, columns), generator=generator)
            basis = torch.linalg.qr(noise).Q
            part.weight = basis if rows > columns else basis.T.contiguous()


def with_adapters(case: Case, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor, Any]:
    """Tensors as in the file of the package ``adapters``, the output, and the whole config."""
    import adapters

    adapters.init(model)
    config = adapters.AdapterConfig.load(case.kind, **case.options)
    model.add_adapter("reference", config=config, set_active=True)
    model.eval()
    generator = torch.Generator().manual_seed(22)
    for name, module in model.named_modules():
        if name.endswith(("adapters.reference", "refts.reference")):
            scatter(module, generator)
    output = result(model(**inputs))
    with tempfile.TemporaryDirectory() as folder:
        model.save_adapter(folder, "reference", with_head=False, use_safetensors=True)
        (file,) = Path(folder).glob("*.safetensors")
        tensors = load_file(file)
        saved = json.loads((Path(folder) / "adapter_config.json").read_text())
    for name, module in model.named_modules():
        if hasattr(module, "parametrizations"):  # the file has two factors of it
            tensors[f"effective.{name}.weight"] = module.weight.detach().clone()
    return tensors, output, saved


def with_pyreft(case: Case, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor, Any]:
    """Tensors as in the files of ``pyreft`` (``<file>.<key>``), the output, and the representations' config.

    Adds the positions to ``inputs``, and the token that ``pyreft`` puts before each prompt (LM) or after each text
    (classifier) so that positions which a short row does not have point at a padding token.
    """
    import pyreft

    share, options = case.options["share_weights"], {k: v for k, v in case.options.items() if k != "share_weights"}
    layers = [0, 1] if share else [0, 1, 0, 1]
    component = "block_output" if case.base == "llama" else "roberta.encoder.layer[{}].output"
    kind = getattr(pyreft, case.kind, None) or getattr(pyreft.interventions, case.kind)
    representations = [
        {
            "layer": layer,
            "component": component.format(layer),
            "low_rank_dimension": 4,
            "intervention": kind(embed_dim=32, low_rank_dimension=4, dtype=torch.float32, **options),
        }
        for layer in layers
    ]
    reft = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations), set_device=False)
    reft.eval()
    generator = torch.Generator().manual_seed(23)
    for intervention in reft.interventions.values():
        intervention.eval()
        scatter(intervention, generator)

    mode = "first" if case.base == "llama" else "last"
    pad = model.config.pad_token_id
    locations = [
        pyreft.dataset.get_intervention_locations(
            last_position=length, positions="f2+l2", num_interventions=len(layers), share_weights=share, pad_mode=mode
        )
        for length in LENGTHS
    ]
    extra = torch.full((len(LENGTHS), 1), 1)
    order = (lambda new, old: [new, old]) if mode == "first" else (lambda new, old: [old, new])
    inputs["input_ids"] = torch.cat(order(pad * extra, inputs["input_ids"]), 1)
    inputs["attention_mask"] = torch.cat(order(0 * extra, inputs["attention_mask"]), 1)
    inputs["intervention_locations"] = torch.tensor(locations) + (mode == "first")  # (batch, interventions, positions)

    _, output = reft(
        {key: inputs[key] for key in ("input_ids", "attention_mask")},
        unit_locations={"sources->base": (None, inputs["intervention_locations"].permute(1, 0, 2).tolist())},
    )
    tensors = {}
    with tempfile.TemporaryDirectory() as folder:
        reft.save(folder)
        for file in sorted(Path(folder).glob("intkey_*.bin")):
            saved = torch.load(file, weights_only=True)
            tensors |= {f"{file.name}.{key}": value.clone() for key, value in saved.items()}
        config = json.loads((Path(folder) / "config.json").read_text())
    for key, intervention in reft.interventions.items():
        if f"intkey_{key}.bin.rotate_layer" not in tensors and hasattr(intervention, "rotate_layer"):
            tensors[f"effective.{key}.rotate_layer"] = intervention.rotate_layer.weight.detach().clone()
    return tensors, result(output), config


def write(case: Case) -> None:
    """Makes one file."""
    torch.manual_seed(0)  # what an orthogonal matrix is stored with is partly random
    model, inputs = base_model(case.base), batch(case)
    run = with_adapters if case.package == "adapters" else with_pyreft
    adapter, adapted, saved = run(case, model, inputs)
    plain = result(base_model(case.base)(**{key: inputs[key] for key in ("input_ids", "attention_mask")}))
    parts = {"adapter": adapter, "inputs": inputs, "outputs": {"adapted": adapted, "plain": plain}}
    tensors = {f"{part}/{key}": value.contiguous() for part, group in parts.items() for key, value in group.items()}
    names = (
        ("torch", "transformers", "adapters") if run is with_adapters else ("torch", "transformers", "pyreft", "pyvene")
    )
    config = {
        "base": case.base,
        "kind": case.kind,
        "options": case.options,
        "padding": case.padding,
        "saved_config": saved,
        "packages": {name: importlib.metadata.version(name) for name in names},
    }
    path = FOLDER / f"{case.name}.safetensors"
    save_file(tensors, path, {"reference": json.dumps(config, sort_keys=True)})
    path.chmod(0o644)
    moved = float((adapted - plain).abs().max())
    print(f"{path.name}: {len(tensors)} tensors, {path.stat().st_size:,} bytes, moves the output by {moved:.2f}")


@torch.no_grad()
def main(package: str) -> None:
    """Makes all files of one package."""
    torch.set_num_threads(1)
    for case in CASES:
        if case.package == package:
            write(case)


if __name__ == "__main__":
    if sys.argv[1:] not in (["adapters"], ["pyreft"]):
        raise SystemExit(__doc__)
    main(sys.argv[1])
