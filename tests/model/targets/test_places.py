"""Where methods that change an output attach, on every architecture that is known, and on others by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from peanut import LNTuningConfig, PeanutError, get_peft_model
from peanut.methods.adaption_prompt import AdaptionPromptConfig
from peanut.methods.bottleneck import BottleneckConfig
from peanut.methods.loreft import LoreftConfig
from peanut.model.layers.hooks import Hooking
from peanut.model.targets.architectures import ARCHITECTURES

from ...support import one_thread, refused  # noqa: F401

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DISTILBERT = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 50}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", TEXT),
    "camembert": ("CamembertModel", "CamembertConfig", TEXT),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", {**TEXT, "embedding_size": 32}),
    "layoutlm": ("LayoutLMForSequenceClassification", "LayoutLMConfig", TEXT),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", TEXT),
    "xlm-roberta": ("XLMRobertaModel", "XLMRobertaConfig", TEXT),
    "mpnet": ("MPNetForSequenceClassification", "MPNetConfig", TEXT),
    "distilbert": ("DistilBertForSequenceClassification", "DistilBertConfig", DISTILBERT),
    "vit": ("ViTForImageClassification", "ViTConfig", {**SIZES, "image_size": 16, "patch_size": 8}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", TEXT),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**TEXT, "num_key_value_heads": 2}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**TEXT, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**TEXT, "num_key_value_heads": 2, "head_dim": 8}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**TEXT, "num_key_value_heads": 2, "head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**TEXT, "num_key_value_heads": 2, "head_dim": 8}),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**TEXT, "num_key_value_heads": 2, "head_dim": 8}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", TEXT),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", TEXT),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", {**TEXT, "num_key_value_heads": 2}),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", T5),
}

BERT = {
    "attention": "attention.output.dense",
    "feed_forward": "output.dense",
    "end": "output.LayerNorm",
    "stream": "attention.output.LayerNorm",
}
LLAMA = {"attention": "self_attn.o_proj", "feed_forward": "mlp.down_proj", "end": "", "stream": ""}
EXPECTED: dict[str, tuple[str, dict[str, str]]] = {
    "bert": ("bert.encoder.layer", BERT),
    "camembert": ("encoder.layer", BERT),
    "electra": ("electra.encoder.layer", BERT),
    "layoutlm": ("layoutlm.encoder.layer", BERT),
    "roberta": ("roberta.encoder.layer", BERT),
    "xlm-roberta": ("encoder.layer", BERT),
    "mpnet": (
        "mpnet.encoder.layer",
        {**BERT, "attention": "attention.attn.o", "stream": "attention.LayerNorm"},
    ),
    "distilbert": (
        "distilbert.transformer.layer",
        {
            "attention": "attention.out_lin",
            "feed_forward": "ffn.lin2",
            "end": "output_layer_norm",
            "stream": "sa_layer_norm",
        },
    ),
    "vit": ("vit.layers", {**LLAMA, "attention": "attention.o_proj", "feed_forward": "mlp.fc2"}),
    "gpt2": ("transformer.h", {**LLAMA, "attention": "attn.c_proj", "feed_forward": "mlp.c_proj"}),
}
"""The blocks and the paths in them; ``stream`` is what puts out what the feed-forward part begins with, if a module."""
DECODERS = [name for name in MODELS if name not in EXPECTED and "t5" not in name]
for name in DECODERS:
    EXPECTED[name] = ("model.layers", LLAMA)


def made(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_class, config_class, sizes = MODELS[name]
        return getattr(hf, model_class)(getattr(hf, config_class)(**sizes)).eval()


def inputs(name: str) -> dict[str, Tensor]:
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    ids = torch.arange(3, 15).reshape(2, 6)
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :4]} if "t5" in name else {})


def places(model: Any) -> list[str]:
    return [place.path for place in model.adapters.places()]


def expected(name: str, *which: str) -> list[str]:
    blocks, paths = EXPECTED[name]
    return [".".join(filter(None, (blocks, str(block), paths[each]))) for block in range(2) for each in which]


def test_every_architecture_is_here() -> None:
    assert MODELS.keys() == {name for name, each in ARCHITECTURES.items() if each.stacks}
    for name in MODELS:
        assert made(name).config.model_type == name


@pytest.mark.parametrize("name", EXPECTED)
def test_paths(name: str) -> None:
    """One of each in every block, and no other."""
    assert set(places(get_peft_model(made(name), BottleneckConfig()))) == set(
        expected(name, "attention", "feed_forward")
    )
    assert places(get_peft_model(made(name), BottleneckConfig(style="pfeiffer"))) == expected(name, "end")
    assert places(get_peft_model(made(name), BottleneckConfig(style="parallel"))) == expected(name, "feed_forward")
    blocks = [f"{EXPECTED[name][0]}.{index}" for index in range(2)]
    assert places(get_peft_model(made(name), LoreftConfig(r=2))) == blocks


@pytest.mark.parametrize("name", ["t5", "mt5"])
def test_paths_of_two_stacks(name: str) -> None:
    """Bottlenecks behind both stacks' own attention (not that across) and feed-forward parts; ReFT where one reads."""
    own = [f"{stack}.block.{block}" for stack in ("encoder", "decoder") for block in range(2)]
    attention = [f"{block}.layer.0.SelfAttention.o" for block in own]
    ends = [f"{block}.layer.{1 if block.startswith('e') else 2}.DenseReluDense.wo" for block in own]
    assert set(places(get_peft_model(made(name), BottleneckConfig()))) == {*attention, *ends}
    assert places(get_peft_model(made(name), BottleneckConfig(style="pfeiffer"))) == own
    assert places(get_peft_model(made(name), BottleneckConfig(style="parallel"))) == ends
    assert places(get_peft_model(made(name), LoreftConfig(r=2))) == own[:2]
    assert places(get_peft_model(made(name), BottleneckConfig(style="pfeiffer", layers_to_transform=[1]))) == own[1::2]


ATTENTION = AdaptionPromptConfig(adapter_len=3, adapter_layers=1)


@pytest.mark.parametrize("name", [name for name in DECODERS if name not in ("phi3", "olmo2")])
def test_attention_modules(name: str) -> None:
    assert places(get_peft_model(made(name), ATTENTION)) == ["model.layers.1.self_attn"]


@pytest.mark.parametrize("name", ["phi3", "olmo2"])
def test_attention_modules_that_adaption_prompts_do_not_fit(name: str) -> None:
    base = made(name)
    with refused(base, "no attention module that adaption prompts fit into"):
        get_peft_model(base, ATTENTION)


@pytest.mark.parametrize("name", MODELS)
def test_the_stream_before_the_feed_forward_part(name: str) -> None:
    """What a parallel adapter hears: what the feed-forward part's answer is added to, or, in BERT, its input."""
    model = made(name)
    adapted = get_peft_model(model, BottleneckConfig(style="parallel"))
    heard: dict[str, Tensor] = {}
    streams: dict[str, Tensor] = {}
    for place in adapted.adapters.places():
        for listener in place.listeners.values():  # type: ignore[attr-defined]
            see = listener.see

            def keep(module: Any, args: Any, kwargs: Any, see: Any = see, path: str = place.path) -> None:
                see(module, args, kwargs)
                heard[path] = see.__self__.heard()

            model.get_submodule(listener.source).register_forward_pre_hook(keep, with_kwargs=True)
        watch(model, name, place.path, streams)
    with torch.no_grad():
        adapted(**inputs(name))
    assert heard.keys() == streams.keys()
    assert len(heard) == (4 if "t5" in name else 2)
    for path, stream in streams.items():
        assert torch.allclose(heard[path], stream, atol=1e-6)


def watch(model: Any, name: str, path: str, streams: dict[str, Tensor]) -> None:
    """Notes the stream by other means: a norm's output, or a block's answer without what its last part adds."""
    if EXPECTED.get(name, ("", LLAMA))[1]["stream"]:
        block = path.removesuffix("." + EXPECTED[name][1]["feed_forward"])
        norm = model.get_submodule(f"{block}.{EXPECTED[name][1]['stream']}")
        norm.register_forward_hook(lambda *args: streams.update({path: args[2]}))
        return
    adding = {"vit": "mlp", "gpt2": "mlp", "olmo2": "post_feedforward_layernorm"}.get(name, "mlp")
    if name.startswith("gemma") and name != "gemma":
        adding = "post_feedforward_layernorm"
    block = ".".join(path.split(".")[:3])
    part = path.removesuffix(".wo") if "t5" in name else f"{block}.{adding}"
    added: list[Tensor] = []
    model.get_submodule(part).register_forward_hook(lambda *args: added.append(args[2]))

    def end(module: Any, args: Any, output: Any) -> None:
        streams[path] = (output[0] if isinstance(output, tuple) else output) - added[-1]

    model.get_submodule(block).register_forward_hook(end)


@pytest.mark.parametrize("name", MODELS)
def test_every_place_is_called(name: str) -> None:
    """Each adapter changes the output by itself."""
    given, base = inputs(name), made(name)
    with torch.no_grad():
        plain = base(**given)[0]
        for style in ("houlsby", "pfeiffer", "parallel"):
            found = places(get_peft_model(made(name), BottleneckConfig(style=style)))  # type: ignore[arg-type]
            assert found
            for place in found:
                model = get_peft_model(made(name), BottleneckConfig(style=style))  # type: ignore[arg-type]
                for key, value in model.adapters.parameters("default"):
                    if key.startswith(f"{place}.bottleneck"):
                        value.add_(0.5 * torch.randn_like(value))
                assert not torch.allclose(model.eval()(**given)[0], plain, atol=1e-3), (style, place)


def test_excluded_and_chosen_blocks(tiny_llama: Any) -> None:
    config = BottleneckConfig(layers_to_transform=[1], exclude_modules=["o_proj"])
    assert places(get_peft_model(tiny_llama(), config)) == ["model.layers.1.mlp.down_proj"]
    assert places(get_peft_model(tiny_llama(), LoreftConfig(r=2, layers_to_transform=0))) == ["model.layers.0"]
    base = tiny_llama()
    with refused(base, r"layers_to_transform names \[2\], and the targets lie in blocks 0 to 1"):
        get_peft_model(base, LoreftConfig(r=2, layers_to_transform=[2]))
    with refused(base, "exclude_modules names 'o_porj'.*nearest: 'o_proj'"):
        get_peft_model(base, BottleneckConfig(exclude_modules=["o_porj"]))


# Other architectures


class Own(nn.Module):
    """A model that nothing is known of."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6)) for _ in range(3)])
        self.attention = nn.MultiheadAttention(6, 2)
        self.picture = nn.Conv2d(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = x + part(x)
        return x


def test_an_unknown_architecture_shows_its_tree() -> None:
    with pytest.raises(PeanutError) as error:
        get_peft_model(Own(), BottleneckConfig())
    line, *tree = str(error.value).split("\n")
    assert line.startswith("no default places of BOTTLENECK for Own (model_type None); expected target_modules; name")
    assert "target_modules=['down_proj']" in line
    assert tree[:5] == ["Own", "  parts: ModuleList", "    0-2: Sequential", "      0: Linear(12, 6)", "      1: ReLU"]
    torch.manual_seed(0)
    other = hf.OPTForCausalLM(
        hf.OPTConfig(vocab_size=50, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4)
    )
    with pytest.raises(PeanutError, match=r"OPTForCausalLM \(model_type 'opt'\)") as error:
        get_peft_model(other, LoreftConfig(r=2))
    assert "0-1: OPTDecoderLayer" in str(error.value)
    model = get_peft_model(other, LoreftConfig(r=2, target_modules=r"model\.decoder\.layers\.\d"))
    assert places(model) == ["model.decoder.layers.0", "model.decoder.layers.1"]


@pytest.mark.parametrize("style", ["houlsby", "pfeiffer", "parallel"])
def test_named_modules_of_another_architecture(style: Any) -> None:
    model = get_peft_model(Own(), BottleneckConfig(style=style, target_modules=r"parts\.\d\.[02]", bottleneck_size=2))
    names = [f"parts.{part}.{layer}" for part in range(3) for layer in (0, 2)]
    assert places(model) == names
    assert model(torch.randn(4, 6)).shape == (4, 6)


def test_what_cannot_be_named() -> None:
    base = Own()
    for name, message in (
        ("out_proj", "'attention.out_proj' belongs to an nn.MultiheadAttention"),
        ("picture", "'picture' is a Conv2d, whose output has its channels first"),
        ("parts", "a ModuleList .'parts'. does not tell the width"),
        ("part", "target_modules names 'part'.*nearest: 'parts'"),
    ):
        with refused(base, message):
            get_peft_model(base, BottleneckConfig(target_modules=[name]))


def test_a_module_that_answers_with_no_tensor() -> None:
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return {"y": super().forward(x)}

    model = get_peft_model(nn.Sequential(Odd(4, 4)), BottleneckConfig(target_modules=["0"], bottleneck_size=2))
    with pytest.raises(PeanutError, match="'0' answered with dict; expected a module that answers with a tensor"):
        model(torch.randn(2, 4))


def test_hooks_follow_wrapping_and_leave_with_the_adapter(tiny_bert: Any) -> None:
    model = tiny_bert()
    before = {name: type(module) for name, module in model.named_modules()}
    adapted = get_peft_model(model, BottleneckConfig(style="pfeiffer"), "bottleneck")
    adapted.add_adapter("parallel", BottleneckConfig(style="parallel"))
    adapted.add_adapter("norms", LNTuningConfig())
    with pytest.warns(UserWarning, match="'parallel' is active now"):
        adapted.delete_adapter("bottleneck")
    adapted.delete_adapter("norms")
    adapted.add_adapter("norms", LNTuningConfig())
    adapted.unload()
    assert {name: type(module) for name, module in model.named_modules()} == before
    for module in model.modules():
        for hook in [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]:
            assert not isinstance(getattr(hook, "__self__", None), Hooking)
