"""Generates text with a trained language model."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import TextStreamer, set_seed

from ..errors import PeanutError
from .model import load_trained
from .tasks import Instruction, LanguageTask, Task

__all__ = ["Generator", "end_tokens"]


class Generator:
    """A trained adapter on its base, ready to answer.

    Args:
        adapter: the adapter's folder, or the run's.
        base_model: the base's folder or hub id, if it is not where it was.
        merge: merge the adapter into the weights first.
        seed: of the random choices.

    Raises:
        PeanutError: the adapter or its base is not as it should be, or is no language model.
    """

    def __init__(
        self, adapter: str | os.PathLike[str], *, base_model: str | None = None, merge: bool = True, seed: int = 0
    ) -> None:
        trained = load_trained(adapter, base_model)
        if not isinstance(trained.task, LanguageTask):
            raise PeanutError(
                f"'{adapter}' was trained for {trained.task.name}", "a language model's adapter", "use peanut eval"
            )
        self.task, self.tokenizer = trained.task, trained.processor
        self.model = trained.model.to(torch.accelerator.current_accelerator() or "cpu").eval()
        if merge:
            self.model.merge_adapter()
        set_seed(seed)

    @torch.no_grad()
    def stream(self, prompt: str, *, max_new_tokens: int = 256, temperature: float = 0.0) -> str:
        """Prints the answer to standard output as it comes, and returns it.

        Args:
            prompt: a question, put into the template of the training; for plain language models the text to continue.
            max_new_tokens: longest answer.
            temperature: 0 takes the likeliest token.
        """
        text, special = prompt, True
        if isinstance(self.task, Instruction):
            text, special = self.task.question(prompt, self.tokenizer)
        inputs = self.tokenizer(text, add_special_tokens=special, return_tensors="pt").to(self.model.device)
        chosen = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        tokens = self.model.generate(
            **inputs,
            **chosen,
            max_new_tokens=max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=end_tokens(self.model, self.task, self.tokenizer),
            streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
        answer: str = self.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return answer


def end_tokens(model: Any, task: Task, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the model's, the tokenizer's, and the one that training put after answers."""
    of_model = model.generation_config.eos_token_id
    learned = task.end_token(tokenizer) if isinstance(task, Instruction) else None
    found = [*(of_model if isinstance(of_model, list) else [of_model]), tokenizer.eos_token_id, learned]
    return sorted({token for token in found if token is not None})
