"""What methods need to know of a model architecture: the names of its layers, and the parts of its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Architecture", "PlaceName", "Stack"]

PlaceName = Literal["block", "attention", "attention_output", "feed_forward_output", "block_end"]
"""A place in a transformer: a whole block; an attention module; the last product of an attention or of a feed-forward
part, before the residual sum; the norm with which a block ends, or the block itself if it ends with none."""


@dataclass(frozen=True)
class Stack:
    """A stack of transformer blocks. All paths are regular expressions; those of places are paths inside a block.

    Args:
        block: the paths of the blocks; its group is the block's number.
        attention: the attention module, which is given the hidden states.
        attention_output: the last product of attention, before the residual sum.
        feed_forward_input: a module that is given the residual stream before the feed-forward part.
        feed_forward_output: the last product of the feed-forward part, before the residual sum.
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

    def paths(self, place: PlaceName) -> str:
        """A regular expression for the paths of a place in all blocks."""
        inside = "" if place == "block" else getattr(self, place)
        return self.block + (rf"\.(?:{inside})" if inside else "")


@dataclass(frozen=True)
class Architecture:
    """What is known of the models of a ``model_type``: what methods change where a config names nothing.

    Targets are names of layers, of which a model need not have all, or one regular expression for whole paths.

    Args:
        attention: the layers in attention that methods change.
        stacks: the stacks of blocks, where methods that change outputs attach.
        scaled_outputs: names of the layers whose output (IA)³ scales.
        scaled_inputs: names of the layers whose input (IA)³ scales.
        last_in_feed_forward: the last layers of the feed-forward parts, if ``stacks`` does not say it.
    """

    attention: tuple[str, ...] | str = ()
    stacks: tuple[Stack, ...] = ()
    scaled_outputs: tuple[str, ...] = ()
    scaled_inputs: tuple[str, ...] = ()
    last_in_feed_forward: str = ""

    @property
    def feed_forward_outputs(self) -> str:
        """A regular expression for the paths of the last layers of the feed-forward parts."""
        return "|".join(stack.paths("feed_forward_output") for stack in self.stacks) or self.last_in_feed_forward
