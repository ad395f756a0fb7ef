"""TRL's trainers, with a model of ours that is ready, and with our config as ``peft_config=``."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf

from peanut import LoraConfig, PeanutConfig, PeftConfig, PeftModel, from_peft, get_peft_model

from ..support import distance, one_thread, randomised  # noqa: F401

os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")

pytestmark = [pytest.mark.usefixtures("installed"), pytest.mark.filterwarnings("ignore")]  # TRL's and its libraries'

CONFIGS: dict[str, Callable[..., PeftConfig]] = {
    "LORA": lambda **more: LoraConfig(r=4, **more),
    "PEANUT": lambda **more: PeanutConfig(r=4, target_modules=["q_proj", "v_proj"], **more),
}
SYMBOLS = ["<pad>", "<s>", "</s>", "<unk>", *map(chr, range(32, 127))]
TEXTS = [{"text": "hello world " * 3}, {"text": "abc def"}] * 4
PREFERENCES = [
    {"prompt": "a b", "chosen": " good", "rejected": " bad"},
    {"prompt": "c", "chosen": " yes yes", "rejected": " no"},
] * 4
DATA: dict[str, list[dict[str, str]]] = {
    "SFT": TEXTS,
    "DPO": PREFERENCES,
    "Reward": [{key: row["prompt"] + row[key] for key in ("chosen", "rejected")} for row in PREFERENCES],
    "GRPO": [{"prompt": "ab"}, {"prompt": "cd"}] * 4,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "SFT": {"max_length": 32},
    "DPO": {"max_length": 32},
    "Reward": {"max_length": 32},
    "GRPO": {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 4, "beta": 0.1},
}

every_config = pytest.mark.parametrize("method", CONFIGS)


@pytest.fixture(scope="module")
def tokenizer() -> hf.PreTrainedTokenizerFast:
    """A tokenizer of single characters."""
    words = tokenizers.models.WordLevel({symbol: i for i, symbol in enumerate(SYMBOLS)}, unk_token="<unk>")
    made = tokenizers.Tokenizer(words)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}{{ eos_token }}{% endfor %}"
    return fast


Base = Callable[[str], hf.PreTrainedModel]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """``base("SFT")``: a small Llama with the head that the trainer wants, from a folder, always the same."""
    config = hf.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=len(SYMBOLS),
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        num_labels=1,
    )
    folder = tmp_path_factory.mktemp("base")
    classes = {True: hf.LlamaForSequenceClassification, False: hf.LlamaForCausalLM}
    for rewards, model_class in classes.items():
        torch.manual_seed(0)
        model_class(config).save_pretrained(folder / str(rewards))
    return lambda kind: classes[kind == "Reward"].from_pretrained(folder / str(kind == "Reward"))


Trainer = Callable[..., Any]


@pytest.fixture
def trainer(tmp_path: Path, tokenizer: hf.PreTrainedTokenizerFast) -> Trainer:
    """``trainer("SFT", model, peft_config=..., max_steps=...)``: TRL's trainer on a few rows."""

    def build(kind: str, model: Any, peft_config: Any = None, **options: Any) -> Any:
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "report_to": [],
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "save_steps": 2,
            "logging_steps": 1,
            "use_cpu": True,
            "learning_rate": 1e-2,
            "bf16": False,
            "disable_tqdm": True,
        }
        more: dict[str, Any] = {"peft_config": peft_config} if peft_config is not None else {}
        if kind == "GRPO":
            more["reward_funcs"] = lambda completions, **_: [float(sum(map(ord, each)) % 7) for each in completions]
        return getattr(trl, f"{kind}Trainer")(
            model=model,
            args=getattr(trl, f"{kind}Config")(**settings | OPTIONS[kind] | options),
            train_dataset=datasets.Dataset.from_list(DATA[kind]),
            processing_class=tokenizer,
            **more,
        )

    return build


def config_for(kind: str, method: str) -> PeftConfig:
    return CONFIGS[method](task_type="SEQ_CLS" if kind == "Reward" else "CAUSAL_LM")


def losses(trained: Any) -> list[float]:
    return [row["loss"] for row in trained.state.log_history if "loss" in row]


def assert_only_adapters(folder: Path) -> None:
    """A folder holds an adapter and no base."""
    files = [*folder.rglob("*.safetensors"), *folder.rglob("*model*.bin")]
    assert {path.name for path in files} == {"adapter_model.safetensors"}
    assert (folder / "adapter_config.json").is_file()
    assert sum(path.stat().st_size for path in files) < 40_000


@every_config
@pytest.mark.parametrize("kind", DATA)
def test_a_ready_model_and_a_config_train_alike(
    kind: str, method: str, base: Base, trainer: Trainer, tmp_path: Path
) -> None:
    found = []
    for ready in (True, False):
        torch.manual_seed(7)
        model = get_peft_model(base(kind), config_for(kind, method)) if ready else base(kind)
        torch.manual_seed(7)
        made = trainer(kind, model, None if ready else config_for(kind, method), seed=7)
        assert isinstance(made.model, PeftModel)
        before = {name: value.clone() for name, value in made.model.named_parameters()}
        made.train()
        changed = {name for name, value in made.model.named_parameters() if not torch.equal(value, before[name])}
        assert changed <= {name for name, value in made.model.named_parameters() if value.requires_grad}
        assert sum("lora_B" in name or "peanut_B" in name for name in changed) > 1
        assert_only_adapters(tmp_path / "run" / "checkpoint-2")
        found.append(losses(made))
    assert len(found[0]) == 2
    assert distance(torch.tensor(found[0]), torch.tensor(found[1])) < (0.01 if kind == "GRPO" else 0.001)
    if kind == "DPO":
        assert found[0][0] == pytest.approx(math.log(2), abs=1e-6)


@every_config
@pytest.mark.parametrize(
    "options",
    [{"gradient_checkpointing": True}, {"bf16": True}, {"packing": True}, {"neftune_noise_alpha": 5.0}],
    ids=lambda options: next(iter(options)),
)
def test_options_change_the_losses_as_little_as_they_should(
    options: dict[str, Any], method: str, base: Base, trainer: Trainer, tmp_path: Path
) -> None:
    """Losses are those of the same options with Hugging Face PEFT's LoRA, whose start changes nothing either."""
    made = trainer("SFT", base("SFT"), config_for("SFT", method), **options)
    made.train()
    theirs = trainer("SFT", base("SFT"), peft.LoraConfig(r=4, task_type="CAUSAL_LM"), **options)
    theirs.train()
    assert losses(made)[0] == pytest.approx(losses(theirs)[0], rel=1e-5)
    assert len(losses(made)) == 2
    assert losses(made)[1] == pytest.approx(losses(theirs)[1], rel=0.05)
    assert_only_adapters(tmp_path / "run" / "checkpoint-2")


@every_config
@pytest.mark.parametrize(("kind", "ready"), [("SFT", True), ("DPO", False)], ids=["SFT, model", "DPO, peft_config"])
def test_resumed_training_is_as_if_never_interrupted(
    kind: str, method: str, ready: bool, base: Base, trainer: Trainer, tmp_path: Path
) -> None:
    def start(steps: int, **options: Any) -> Any:
        torch.manual_seed(3)
        config = config_for(kind, method)
        model, given = (get_peft_model(base(kind), config), None) if ready else (base(kind), config)
        return trainer(kind, model, given, max_steps=steps, lr_scheduler_type="constant", **options)

    whole = start(4, save_steps=4)
    whole.train()
    start(2).train()
    resumed = start(4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert len(losses(whole)) == len(losses(resumed)) == 4
    assert losses(resumed)[2:] == pytest.approx(losses(whole)[2:], rel=1e-5)
    assert losses(whole)[3] != pytest.approx(losses(whole)[2], rel=1e-5)


def adapter_of_ours(folder: Path, base: Base, method: str) -> Path:
    """A folder with an adapter that changes the model."""
    torch.manual_seed(5)
    model = randomised(get_peft_model(base("DPO"), config_for("DPO", method)), scale=0.3)
    model.save_pretrained(folder)
    return folder


@every_config
@pytest.mark.parametrize("precompute", [True, False], ids=["precomputed", "in every step"])
def test_the_reference_of_a_trained_adapter_is_itself(
    precompute: bool, method: str, base: Base, trainer: Trainer, tmp_path: Path
) -> None:
    folder = adapter_of_ours(tmp_path / "adapter", base, method)
    model = PeftModel.from_pretrained(base("DPO"), folder, is_trainable=True)
    made = trainer("DPO", model, precompute_ref_log_probs=precompute)
    assert made.ref_model is None
    assert set(made.model.peft_config) == {"default", "ref"}
    held = sum(value.numel() for value in made.model.parameters())
    adapters = sum(
        value.numel() for name, value in made.model.named_parameters() if ".default" in name or ".ref" in name
    )
    assert held - adapters == sum(value.numel() for value in base("DPO").parameters())
    reference = {name: value.clone() for name, value in made.model.named_parameters() if ".ref" in name}
    assert reference
    made.train()
    assert losses(made)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(made)[1] != pytest.approx(math.log(2), abs=1e-6)
    assert made.model.active_adapter == "default"
    after = dict(made.model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in reference.items())
    assert not torch.equal(
        *(torch.cat([v.flatten() for n, v in after.items() if f".{name}" in n]) for name in ("default", "ref"))
    )
    # The reference's own numbers, by hand: the adapter as it was loaded.
    batch = made.data_collator([made.train_dataset[0]])
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(base("DPO"), folder)(input_ids=batch["input_ids"]).logits
        made.model.set_adapter("ref")
        assert distance(made.model.eval()(input_ids=batch["input_ids"]).logits, loaded) < 1e-6


@every_config
def test_weights_are_sent_to_a_server_as_trl_sends_them(method: str, base: Base) -> None:
    """What TRL's vLLM client does: merge, name each tensor as the base does, skip the adapter's, unmerge."""
    config = CONFIGS[method](task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    model = randomised(get_peft_model(base("SFT"), config), scale=0.3).eval()
    ids = torch.arange(4, 24).reshape(2, 10)
    with torch.no_grad():
        expected = model(ids).logits
    assert model.prefix == f"{method.lower()}_"
    before = {name: value.clone() for name, value in model.named_parameters()}
    sent = base("SFT").eval()
    wanted = dict(sent.named_parameters())
    model.merge_adapter()
    for path, value in model.named_parameters():
        name = path.removeprefix("base_model.model.").replace(".base_layer", "")
        if model.prefix not in name and "original_module" not in name:
            wanted.pop(name.replace("modules_to_save.default.", "")).data.copy_(value)
    model.unmerge_adapter()
    assert not wanted
    with torch.no_grad():
        assert distance(sent(ids).logits, expected) < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


@every_config
def test_reference_passes_may_be_nested(method: str, base: Base) -> None:
    model = randomised(get_peft_model(base("SFT"), config_for("SFT", method)), scale=0.3).eval()
    ids = torch.arange(4, 24).reshape(2, 10)
    with torch.no_grad():
        plain, expected = base("SFT").eval()(ids).logits, model(ids).logits
        with model.disable_adapter():
            with model.disable_adapter():
                assert torch.equal(model(ids).logits, plain)
            assert torch.equal(model(ids).logits, plain)
        assert torch.equal(model(ids).logits, expected)
    assert distance(plain, expected) > 0.01


# The peer's models, made ours


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_one_line_after_the_trainer_made_its_model(kind: str, base: Base, trainer: Trainer, tmp_path: Path) -> None:
    """The trainer makes Hugging Face PEFT's model from its config; ``from_peft`` gives the same losses and files."""
    found, states = [], []
    for ours in (False, True):
        config = peft.LoraConfig(r=4, task_type="CAUSAL_LM")
        made = trainer(kind, base(kind), config, seed=1)
        assert type(made.model).__module__.startswith("peft.")
        if ours:
            made.model = made.model_wrapped = from_peft(made.model)
        made.train()
        assert_only_adapters(tmp_path / "run" / "checkpoint-2")
        found.append(losses(made))
        states.append(peft.load_peft_weights(str(tmp_path / "run" / "checkpoint-2")))
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert states[0].keys() == states[1].keys()
    assert all(distance(states[1][key], value) < 0.02 for key, value in states[0].items())


@every_config
def test_a_flow_like_llama_factorys(method: str, base: Base, tmp_path: Path) -> None:
    """It calls the functions of Hugging Face PEFT by name, casts what is trained, and loads and merges at the end."""
    ids = torch.arange(4, 24).reshape(2, 10)
    model = base("SFT").to(torch.bfloat16)
    model.enable_input_require_grads()
    adapted: Any = peft.get_peft_model(model, config_for("SFT", method))
    for parameter in filter(lambda each: each.requires_grad, adapted.parameters()):
        parameter.data = parameter.data.to(torch.float32)
    adapted.print_trainable_parameters()
    assert adapted.get_nb_trainable_parameters()[0] == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    adapted.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW([each for each in adapted.parameters() if each.requires_grad], lr=0.05)
    steps = []
    for _ in range(3):
        loss = adapted.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append(loss.item())
    assert steps[2] < steps[0]
    adapted.save_pretrained(tmp_path)
    assert_only_adapters(tmp_path)
    # Loaded again to go on, once ours was trained by then, and merged.
    again: Any = PeftModel.from_pretrained(base("SFT").to(torch.bfloat16), tmp_path, is_trainable=True)
    assert [name for name, value in again.named_parameters() if value.requires_grad]
    trained = dict(adapted.named_parameters())
    assert all(torch.equal(value, trained[name]) for name, value in again.named_parameters())
    with torch.no_grad():
        expected = again.eval()(ids).logits
    merged = again.merge_and_unload()
    assert not isinstance(merged, PeftModel)
    with torch.no_grad():
        assert distance(merged(ids).logits.float(), expected.float()) < 0.05


@every_config
def test_a_flow_like_axolotls(method: str, base: Base, trainer: Trainer, tmp_path: Path) -> None:
    """It calls ``get_peft_model`` or loads an adapter, freezes by name, and hands the model over ready."""
    folder = adapter_of_ours(tmp_path / "adapter", base, method)
    model: Any = PeftModel.from_pretrained(base("SFT"), folder, is_trainable=True)
    assert model.base_model.model is model.get_base_model()
    assert model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.shape == (32, 32)
    for name, parameter in model.named_parameters():
        if "layers.0." in name:
            parameter.requires_grad_(False)
    model.enable_input_require_grads()
    before = {name: value.clone() for name, value in model.named_parameters()}
    made = trainer("SFT", model, gradient_checkpointing=True)
    made.train()
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed
    assert all("layers.1." in name for name in changed)
    made.save_model(str(tmp_path / "final"))
    assert_only_adapters(tmp_path / "final")


def test_a_flow_that_makes_the_peers_model_goes_on_with_ours(base: Base, tmp_path: Path) -> None:
    ids = torch.arange(4, 24).reshape(2, 10)
    theirs: Any = peft.get_peft_model(base("SFT"), peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False))
    optimizer = torch.optim.SGD([each for each in theirs.parameters() if each.requires_grad], lr=0.5)
    with torch.no_grad():
        expected = theirs.eval()(ids).logits
    model = from_peft(theirs)
    with torch.no_grad():
        assert distance(model(ids).logits, expected) < 1e-5
    loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    with contextlib.redirect_stdout(None):
        model.print_trainable_parameters()
    assert model(input_ids=ids, labels=ids).loss < loss
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base("SFT"), tmp_path)
    with torch.no_grad():
        assert distance(again(ids).logits, model.eval()(ids).logits) < 1e-5
