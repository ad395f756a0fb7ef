"""LoReFT and DiReFT against their formulas, and against the packages ``adapters`` and ``pyreft``."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from peanut import PeanutError, PeftModel, get_peft_model
from peanut.methods.direft import DireftConfig
from peanut.methods.loreft import LoreftConfig
from peanut.methods.prompt_tuning import PromptTuningConfig
from peanut.methods.reft import ends_of, orthonormal

from ..references.reading import NAMES, Reference, load
from ..support import distance, filled, one_thread, randomised, refused  # noqa: F401

REFERENCES = [name for name in NAMES if "reft" in name]
CONFIGS: dict[str, Callable[..., Any]] = {"loreft": LoreftConfig, "direft": DireftConfig}


@pytest.mark.parametrize("name", REFERENCES)
def test_equals_the_other_packages(name: str) -> None:
    """All rows of pyreft; of ``adapters`` not the row of three tokens, where its two ends overlap."""
    reference = load(name)
    package, kind = name.split("_")[:2]
    options = reference.config["options"]
    values = VALUES[package](reference)
    config = CONFIGS["loreft" if kind == "noreft" else kind](
        r=4,
        positions=2,
        tied=bool(options.get("tied_weights") or options.get("share_weights")),
        act_fn=options.get("act_fn") or options.get("non_linearity") or "linear",
        orthogonality=kind == "loreft" or (package == "pyreft" and kind == "direft"),
        init_weights=False,
    )
    model = filled(get_peft_model(reference.base_model(), config), values).eval()
    with torch.no_grad():
        output = model(**reference.call())
    found = output.logits if "logits" in output else output.last_hidden_state
    expected, mask = reference.outputs["adapted"], reference.inputs["attention_mask"].bool()
    if package == "adapters":
        found, expected, mask = found[:2], expected[:2], mask[:2]
    found, expected = (found[mask], expected[mask]) if found.dim() == 3 else (found, expected)
    assert distance(found, expected) < 2e-6


def from_adapters(reference: Reference) -> dict[str, Tensor]:
    """Tensors by our names: each block's units, one for each end or one for both."""
    found: dict[str, Tensor] = {}
    base = "encoder.layer" if reference.config["base"] == "bert" else "model.layers"
    for block in range(2):
        parts: dict[str, list[Tensor]] = {"reft_R": [], "reft_W": [], "reft_b": []}
        for unit in range(2):
            path = f"{base}.{block}.reft_layer.refts.reference.units.{unit}"
            if f"{path}.learned_source.weight" not in reference.adapter:
                continue
            projection = f"{path}.projection.weight"
            prefix = "effective." if f"effective.{projection}" in reference.adapter else ""
            parts["reft_R"].append(reference.adapter[prefix + projection])
            parts["reft_W"].append(reference.adapter[f"{path}.learned_source.weight"])
            parts["reft_b"].append(reference.adapter[f"{path}.learned_source.bias"])
        found |= {f"{base}.{block}.{suffix}": torch.stack(values) for suffix, values in parts.items()}
    return found


def from_pyreft(reference: Reference) -> dict[str, Tensor]:
    """Tensors by our names; a bias of NoReFT's projection goes into b, from which it is taken away."""
    found: dict[str, list[Tensor]] = {}
    base = "model.layers" if reference.config["base"] == "llama" else "roberta.encoder.layer"
    for key in sorted({key.partition(".bin.")[0] for key in reference.adapter if ".bin." in key}):
        tensors = {
            name.partition(".bin.")[2]: value for name, value in reference.adapter.items() if name.startswith(key)
        }
        block = re.findall(r"layer[_\[](\d)", key)[0]
        effective = f"effective.{key.removeprefix('intkey_')}.rotate_layer"
        if "proj_layer.weight" in tensors:
            R = tensors["proj_layer.weight"]
        else:
            R = reference.adapter.get(effective, tensors.get("rotate_layer")).T  # type: ignore[union-attr]
        W = tensors["weight"] if "weight" in tensors else tensors["learned_source.weight"]
        b = tensors["bias"] if "bias" in tensors else tensors["learned_source.bias"]
        b = b - tensors.get("proj_layer.bias", torch.zeros(4))
        for suffix, value in (("reft_R", R), ("reft_W", W), ("reft_b", b)):
            found.setdefault(f"{base}.{block}.{suffix}", []).append(value)
    return {key: torch.stack(values) for key, values in found.items()}


VALUES = {"adapters": from_adapters, "pyreft": from_pyreft}


# Against the formulas, written again token by token

METHODS = [
    pytest.param(LoreftConfig(act_fn="tanh", init_weights=False, r=3, positions=2), id="loreft"),
    pytest.param(LoreftConfig(r=3, positions=3, tied=True), id="loreft-tied-linear"),
    pytest.param(LoreftConfig(r=3, positions=9, orthogonality=False), id="noreft"),
    pytest.param(DireftConfig(act_fn="tanh", r=3, positions=2), id="direft"),
    pytest.param(DireftConfig(r=3, positions=2, orthogonality=True, tied=True), id="direft-orthogonal"),
]


def gram_schmidt(rows: Tensor) -> Tensor:
    made: list[Tensor] = []
    for row in rows:
        left = row
        for other in made:
            left = left - (left @ other) * other
        made.append(left / left.norm())
    return torch.stack(made)


def changed(config: Any, values: dict[str, Tensor], path: str, h: Tensor, prompts: list[list[int]]) -> Tensor:
    """What a block's output h (batch, tokens, d) becomes, with the positions of each row's prompt in order."""
    h = h.clone()
    f = torch.tanh if config.act_fn == "tanh" else lambda x: x
    for row, tokens in enumerate(prompts):
        k = min(config.positions, len(tokens) // 2)
        for end, places in enumerate((tokens[:k], tokens[len(tokens) - k :])):
            index = 0 if config.tied else end
            R, W, b = (values[f"{path}.{suffix}"][index] for suffix in ("reft_R", "reft_W", "reft_b"))
            R = gram_schmidt(R) if config.orthogonality else R
            for t in places:
                taken = R @ h[row, t] if isinstance(config, LoreftConfig) else 0
                h[row, t] = h[row, t] + R.T @ (f(W @ h[row, t] + b) - taken)
    return h


class Stack(nn.Module):
    """Two blocks, of which nothing tells where tokens come from."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(layer(x))
        return x


@pytest.mark.parametrize("config", METHODS)
def test_formula(config: Any) -> None:
    """In a plain module all tokens are the prompt."""
    base, x = Stack().double(), torch.randn(2, 5, 8, dtype=torch.float64)
    named = type(config)(**{**config.to_dict(), "target_modules": ["layers.0", "layers.1"]})
    model = randomised(get_peft_model(Stack().double(), named)).eval()
    values = {key: value.detach() for key, value in model.adapters.parameters("default")}
    expected = x
    for index, layer in enumerate(base.layers):
        expected = torch.sin(changed(config, values, f"layers.{index}", layer(expected).detach(), [list(range(5))] * 2))
    assert distance(model(x), expected) < 1e-12
    assert distance(model(x), base(x)) > 0.05


@pytest.mark.parametrize("config", METHODS)
def test_formula_in_a_language_model(config: Any, tiny_llama: Any) -> None:
    """Padding on either side, and answers, are no part of the prompt; the last block is compared."""
    config = type(config)(**{**config.to_dict(), "layers_to_transform": [1]})
    ids = torch.arange(2, 32).reshape(3, 10)
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[0, :3] = mask[1, 7:] = 0
    labels = torch.full_like(ids, -100)
    labels[0, 8:] = ids[0, 8:]
    labels[2, 5:] = ids[2, 5:]
    base = tiny_llama().double()
    model = randomised(get_peft_model(tiny_llama().double(), config)).eval()
    with torch.no_grad():
        seen: list[Tensor] = []
        handle = base.model.layers[1].register_forward_hook(lambda *args: seen.append(args[2]))
        base(input_ids=ids, attention_mask=mask)
        handle.remove()
        prompts = [list(range(3, 8)), list(range(7)), list(range(5))]
        values = {key: value.detach() for key, value in model.adapters.parameters("default")}
        expected = base.lm_head(base.model.norm(changed(config, values, "model.layers.1", seen[0], prompts)))
        found = model(input_ids=ids, attention_mask=mask, labels=labels).logits
    assert distance(found, expected) < 1e-10


def test_ends() -> None:
    prompt = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    places, there = ends_of(prompt, 2)
    assert places[0].tolist() == [[1, 2], [5, 4]]
    assert places[1, :, 0].tolist() == [0, 2]
    assert there.tolist() == [[True, True], [True, False], [False, False], [False, False]]


def test_positions_count_the_users_tokens(tiny_llama: Any) -> None:
    """Virtual tokens of prompt tuning are before them, and are not changed."""
    ids = torch.arange(2, 14).reshape(2, 6)
    config = LoreftConfig(r=3, positions=2, layers_to_transform=[1], init_weights=False)
    model = get_peft_model(tiny_llama().double(), PromptTuningConfig(num_virtual_tokens=3), "prompt")
    model.add_adapter("reft", config)
    randomised(model).eval()
    block = model.get_base_model().model.layers[1]
    values = {key: value.detach() for key, value in model.adapters.parameters("reft")}
    seen: list[Tensor] = []
    handle = block.register_forward_hook(lambda *args: seen.append(args[2].detach()))
    model.set_adapter("prompt")
    model(input_ids=ids)
    model.set_adapter(["prompt", "reft"])
    model(input_ids=ids)
    handle.remove()
    assert seen[0].shape == (2, 9, 32)
    expected = changed(config, values, "model.layers.1", seen[0], [list(range(3, 9))] * 2)
    assert distance(seen[1], expected) < 1e-12
    assert distance(seen[1], seen[0]) > 0.01


# R, and the start


def test_orthonormal() -> None:
    rows = torch.randn(2, 3, 9, dtype=torch.float64)
    found = orthonormal(rows)
    assert distance(found, torch.stack([gram_schmidt(each) for each in rows])) < 1e-12
    assert distance(orthonormal(found), found) < 1e-14
    half = orthonormal(rows.bfloat16())
    assert half.dtype == torch.bfloat16
    assert distance(half, orthonormal(rows.bfloat16().float())) < 1e-2
    assert torch.autograd.gradcheck(orthonormal, rows.clone().requires_grad_())


def test_rows_stay_orthonormal_in_training() -> None:
    x, losses = torch.randn(4, 6, 8), []
    model = get_peft_model(Stack(), LoreftConfig(r=3, positions=2, target_modules=["layers.1"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(40):
        loss = (model(x) - 1).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rows = orthonormal(dict(model.adapters.parameters("default"))["layers.1.reft_R"].detach())
    assert distance(rows @ rows.mT, torch.eye(3).expand(2, 3, 3)) < 1e-5
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("method", ["loreft", "direft"])
def test_a_new_adapter_changes_nothing_or_as_published(
    method: str, dtype: torch.dtype, wide: bool, tiny_llama: Any
) -> None:
    ids = torch.arange(2, 14).reshape(2, 6)
    with torch.no_grad():
        plain = tiny_llama().to(dtype)(ids).logits
        new = get_peft_model(tiny_llama().to(dtype), CONFIGS[method](), autocast_adapter_dtype=wide).eval()
        assert torch.equal(new(ids).logits, plain)
        published = get_peft_model(tiny_llama().to(dtype), CONFIGS[method](init_weights=False)).eval()
        assert distance(published(ids).logits, plain) > 0.01


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("loreft", {"act_fn": "gelu"}, "act_fn='gelu'.*set init_weights=False"),
        ("direft", {"act_fn": "sigmoid"}, "act_fn='sigmoid'.*set init_weights=False"),
        ("loreft", {"r": 0}, "r=0"),
        ("loreft", {"positions": 0}, "positions=0"),
        ("direft", {"dropout": 1}, "dropout=1"),
    ],
)
def test_bad_configs(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PeanutError, match=message):
        CONFIGS[method](**options)


def test_what_does_not_fit(tiny_llama: Any) -> None:
    base = tiny_llama()
    with refused(base, "r=33 at 'model.layers.0', whose output is 32 wide"):
        get_peft_model(base, LoreftConfig(r=33))
    flat = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoreftConfig(r=2, target_modules=["0"]))
    with pytest.raises(PeanutError, match=r"shape \(4, 8\); expected \(batch, tokens, width\)"):
        flat(torch.randn(4, 8))


def test_encoder_of_two_stacks() -> None:
    torch.manual_seed(0)
    config = hf.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    base = hf.T5ForConditionalGeneration(config).eval()
    with refused(base, "'decoder.block.0' does not lie in the encoder"):
        get_peft_model(base, LoreftConfig(r=2, target_modules=r"decoder\.block\.\d"))
    model: PeftModel = get_peft_model(base, LoreftConfig(r=2))
    assert [place.path for place in model.adapters.places()] == ["encoder.block.0", "encoder.block.1"]
