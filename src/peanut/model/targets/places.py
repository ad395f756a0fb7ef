"""Where methods that change an output attach, by architecture."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ...errors import PeanutError
from ...protocols import OutputMethod, PeftConfig, Site
from ...weights import FrozenLayer, kind_of
from .matching import bare, modules_by_path, named_paths, narrowed
from .shape import reading_stack
from .tree import module_tree

__all__ = ["PLACES", "Places", "sites"]


@dataclass(frozen=True)
class Places:
    """The places of a stack of blocks, each a path inside a block. All are regular expressions.

    Args:
        block: the paths of the blocks; its group is the block's number.
        attention: the attention module, which is given the hidden states.
        attention_output: the last product of attention, before it is added to the stream.
        feed_forward_input: a module that is given the stream as the feed-forward part finds it.
        feed_forward_output: the last product of the feed-forward part, before it is added to the stream.
        block_end: the norm with which a block ends, empty where the block ends with the sum itself.
        writes: whether it is a decoder beside an encoder that reads the user's tokens.
    """

    block: str
    attention: str
    attention_output: str
    feed_forward_input: str
    feed_forward_output: str
    block_end: str = ""
    writes: bool = False


_BERT = Places(
    r"(?:.*\.)?encoder\.layer\.(\d+)",
    r"attention\.self",
    r"attention\.output\.dense",
    r"intermediate\.dense",
    r"output\.dense",
    r"output\.LayerNorm",
)
_MPNET = replace(_BERT, attention=r"attention\.attn", attention_output=r"attention\.attn\.o")
_DISTILBERT = Places(
    r"(?:.*\.)?layer\.(\d+)", "attention", r"attention\.out_lin", "ffn", r"ffn\.lin2", "output_layer_norm"
)
_LLAMA = Places(
    r"(?:.*\.)?layers\.(\d+)", "self_attn", r"self_attn\.o_proj", "post_attention_layernorm", r"mlp\.down_proj"
)
_GEMMA = replace(_LLAMA, feed_forward_input="pre_feedforward_layernorm")
_OLMO = replace(_LLAMA, feed_forward_input="mlp")  # it norms what its parts answer, not what they are given
_VIT = Places(r"(?:.*\.)?layers\.(\d+)", "attention", r"attention\.o_proj", "layernorm_after", r"mlp\.fc2")
_GPT2 = Places(r"(?:.*\.)?h\.(\d+)", "attn", r"attn\.c_proj", "ln_2", r"mlp\.c_proj")
_T5_ENCODER = Places(
    r"(?:.*\.)?encoder\.block\.(\d+)",
    r"layer\.0\.SelfAttention",
    r"layer\.0\.SelfAttention\.o",
    r"layer\.1",
    r"layer\.1\.DenseReluDense\.wo",
)
_T5_DECODER = replace(
    _T5_ENCODER,
    block=r"(?:.*\.)?decoder\.block\.(\d+)",
    feed_forward_input=r"layer\.2",
    feed_forward_output=r"layer\.2\.DenseReluDense\.wo",
    writes=True,
)

PLACES: dict[str, tuple[Places, ...]] = {
    "bert": (_BERT,),
    "camembert": (_BERT,),
    "electra": (_BERT,),
    "roberta": (_BERT,),
    "xlm-roberta": (_BERT,),
    "mpnet": (_MPNET,),
    "distilbert": (_DISTILBERT,),
    "vit": (_VIT,),
    "gpt2": (_GPT2,),
    "llama": (_LLAMA,),
    "mistral": (_LLAMA,),
    "qwen2": (_LLAMA,),
    "qwen3": (_LLAMA,),
    "gemma": (_LLAMA,),
    "gemma2": (_GEMMA,),
    "gemma3_text": (_GEMMA,),
    "phi3": (_LLAMA,),
    "olmo2": (_OLMO,),
    "smollm3": (_LLAMA,),
    "t5": (_T5_ENCODER, _T5_DECODER),
    "mt5": (_T5_ENCODER, _T5_DECODER),
}
"""``model_type`` → the places of its stacks."""


def sites(model: nn.Module, config: PeftConfig, method: OutputMethod[Any]) -> list[Site]:
    """The modules whose output ``method`` changes, in the model's order.

    Raises:
        PeanutError: the architecture is not known and the config names no modules; it names none that are there; what
            it names has no last dimension to change; nothing is left.
    """
    modules = modules_by_path(model)
    settings = getattr(model, "config", None)
    model_type = str(getattr(settings, "model_type", None))
    if config.target_modules is None:
        if model_type not in PLACES:
            raise PeanutError(
                f"no default places of {method.name} for {type(model).__name__} (model_type {model_type!r})",
                "target_modules",
                "name the modules whose output is to be changed, for instance target_modules=['down_proj'] (every "
                "path that ends so) or a regular expression for whole paths, out of this tree:",
                detail=module_tree(model),
            )
        places = _by_place(list(modules), PLACES[model_type], method, config)
        left = narrowed(model, list(places), config, modules) if places else []
    else:
        left = named_paths(model, config, method, modules)
        places = dict.fromkeys(left, "named")
        _refuse_writers(model, left, modules, method)
    blocks = {path: _block(path, model_type) for path in places}
    counts = {
        stack: 1 + max(number for other, number in blocks.values() if other == stack) for stack, _ in blocks.values()
    }
    made = []
    for path in left:
        (stack, number), place = blocks[path], places[path]
        if method.chosen(config, number, counts[stack]):
            source = _source(path, method.source(config, place), model_type, modules) if place != "named" else None
            width, reads = _sizes(modules[path], path, settings, heard=source is not None)
            block = number, counts[stack]
            made.append(Site(path, place, width, reads, bare(modules[path]), block, source, settings))
    if not made:
        raise PeanutError(
            f"{method.name} finds no module to change in {type(model).__name__}",
            "at least one",
            "name modules in target_modules, out of this tree:",
            detail=module_tree(model),
        )
    return made


def _refuse_writers(
    model: nn.Module, paths: list[str], modules: dict[str, nn.Module], method: OutputMethod[Any]
) -> None:
    """Refuses modules of a decoder beside an encoder if the method looks at the tokens that the encoder reads."""
    if not method.reads_prompt or not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return
    inside = set(reading_stack(model).modules())
    for path in paths:
        if modules[path] not in inside:
            raise PeanutError(
                f"'{path}' does not lie in the encoder, and {method.name} acts on the tokens that are read there",
                "modules of the encoder",
                "name those, by a regular expression for whole paths",
            )


def _by_place(
    paths: list[str], stacks: tuple[Places, ...], method: OutputMethod[Any], config: PeftConfig
) -> dict[str, str]:
    """The places of the modules that the method changes, by path, in the model's order."""
    patterns = {}
    for place in method.places(config):
        for stack in stacks:
            inside = "" if place == "block" else getattr(stack, place)
            if not (stack.writes and method.reads_prompt):
                patterns[stack.block + (rf"\.(?:{inside})" if inside else "")] = place
    return {path: place for path in paths for pattern, place in patterns.items() if re.fullmatch(pattern, path)}


def _source(path: str, source: str | None, model_type: str, modules: dict[str, nn.Module]) -> str | None:
    """The path of the module whose input is x for the module at ``path``."""
    if source is None:
        return None
    stack, block = next((each, found) for each in PLACES[model_type] if (found := re.match(each.block, path)))
    pattern = rf"{re.escape(block.group())}\.(?:{getattr(stack, source)})"
    return next(path for path in modules if re.fullmatch(pattern, path))


def _block(path: str, model_type: str) -> tuple[str, int]:
    """The stack that ``path`` lies in and the number of its block there; ("", 0) if there are no numbers."""
    known = [rf"(?:{each.block})(?:\.|$)" for each in PLACES.get(model_type, ())]
    for pattern in [*known, r"(?:.*?\.)??[^.]*\.(\d+)(?:\.|$)"]:
        match = re.match(pattern, path)
        if match:
            return path[: match.start(1)], int(match.group(1))
    return "", 0


def _sizes(module: nn.Module, path: str, settings: object, *, heard: bool) -> tuple[int, int]:
    """The sizes of the last dimension of a module's output, and of x, which is the stream's if it is ``heard``."""
    kind, stream = kind_of(bare(module)), getattr(settings, "hidden_size", None)
    sizes: tuple[Any, Any] = stream, stream
    if (kind is not None and kind.name == "conv2d") or isinstance(bare(module), nn.GroupNorm):
        raise PeanutError(
            f"'{path}' is a {type(bare(module)).__name__}, whose output has its channels first",
            "a module whose output ends in the dimension to change",
            "name other modules",
        )
    if kind is not None and kind.name == "norm":
        weight: Any = bare(module).weight
        sizes = weight.shape[-1], weight.shape[-1]
    elif kind is not None:
        layer = FrozenLayer(bare(module), kind)
        sizes = layer.out_features, stream if heard else layer.in_features
    if not all(isinstance(size, int) for size in sizes):
        raise PeanutError(
            f"a {type(bare(module)).__name__} ('{path}') does not tell the width of its output, nor does the model's "
            "config",
            "a module like a linear layer, or a config with hidden_size",
            "name linear layers in target_modules",
        )
    return sizes
