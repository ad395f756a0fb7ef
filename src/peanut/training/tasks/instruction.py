"""Instruction tuning: chat messages, prompt and completion, or instruction (and input) and output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from ...errors import PeanutError
from ..data import check_column
from .language import LanguageTask

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["PLAIN", "Instruction"]

PLAIN = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if not loop.last or message['role'] != 'assistant' %}{{ '\\n\\n' }}{% endif %}{% endfor %}"
)
"""The template for a tokenizer without one: the parts with an empty line between, an end token after each answer."""

FORMS = {"messages": ("messages",), "prompt": ("prompt", "completion"), "instruction": ("instruction", "output")}
"""The three forms, by their first column: the columns that each needs."""

Message = dict[str, str]


class Instruction(LanguageTask):
    """Questions and answers; only the tokens of the answers are learned."""

    name = "instruction"

    @property
    def text_columns(self) -> tuple[str, ...]:
        return tuple(self.column(key) for keys in FORMS.values() for key in keys if key != "messages")

    def column(self, key: str) -> str:
        """The name of the column that plays the part ``key``: the part's own name if the config names no other."""
        return getattr(self.data, key) or key

    def form(self, rows: Dataset, source: str) -> str:
        """Which of the three forms ``rows`` have: the one that the config names, or whose columns are all there."""
        named = [form for form, keys in FORMS.items() if any(getattr(self.data, key) for key in keys)]
        found = [form for form, keys in FORMS.items() if all(self.column(key) in rows.column_names for key in keys)]
        if named or found:
            return (named or found)[0]
        forms = "; or ".join(" and ".join(map(self.column, keys)) for keys in FORMS.values())
        raise PeanutError(
            f"'{source}' has the columns {', '.join(map(repr, rows.column_names))}",
            f"{forms}",
            "name the columns, for instance data.prompt and data.completion",
        )

    def check(self, rows: Dataset, source: str) -> None:
        form = self.form(rows, source)
        for key in FORMS[form]:
            check_column(rows, self.column(key), f"data.{key}", source, kind=None if form == "messages" else "text")
        for row, messages in enumerate(self.conversations(rows, source), start=1):
            _check_messages(messages, row, source)

    def conversations(self, rows: Dataset, source: str) -> Iterator[list[Message]]:
        """Every row as chat messages."""
        form = self.form(rows, source)
        if form == "messages":
            yield from rows[self.column("messages")]
            return
        questions, answers = (rows[self.column(key)] for key in FORMS[form])
        extra = self.column("input")
        inputs = rows[extra] if form == "instruction" and extra in rows.column_names else [None] * len(rows)
        for question, more, answer in zip(questions, inputs, answers, strict=True):
            yield [
                {"role": "user", "content": f"{question}\n\n{more}" if more else question},
                {"role": "assistant", "content": answer},
            ]

    def template(self, processor: Any) -> str:
        """The Jinja template with which a conversation becomes text.

        Raises:
            PeanutError: the tokenizer's own is asked for and it has none.
        """
        own: str | None = processor.chat_template
        if self.data.template == "plain" or (self.data.template == "auto" and not own):
            return PLAIN
        if not own:
            raise PeanutError("data.template is 'chat'", "a tokenizer with a chat template", "set data.template: plain")
        return own

    def question(self, text: str, processor: Any) -> tuple[str, bool]:
        """A question in the template, up to its answer, and whether special tokens are still to be added."""
        template = self.template(processor)
        messages = [{"role": "user", "content": text}]
        prompt = processor.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        return prompt, template is PLAIN

    def end_token(self, processor: Any) -> int | None:
        """The special token with which the template ends an answer; a base model's own end token is often another."""
        template = self.template(processor)
        prompt, _ = self.question("q", processor)
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        text: str = processor.apply_chat_template(messages, chat_template=template, tokenize=False)
        tail = processor(text.removeprefix(prompt), add_special_tokens=False)["input_ids"]
        special = {token for token, added in processor.added_tokens_decoder.items() if added.special}
        return next((token for token in tail if text.startswith(prompt) and token in special), None)

    def encode(self, rows: Dataset, processor: Any, source: str) -> Dataset:
        import datasets

        template = self.template(processor)
        encoded = [self.encode_one(messages, processor, template) for messages in self.conversations(rows, source)]
        kept = [row for row in encoded if any(label != -100 for label in row["labels"][1:])]
        self.dropped += len(encoded) - len(kept)
        if not kept:
            raise PeanutError(
                f"no answer of '{source}' starts within {self.data.max_length} tokens",
                "some that do",
                "raise data.max_length",
            )
        return datasets.Dataset.from_list(kept)

    def encode_one(self, messages: list[Message], processor: Any, template: str) -> dict[str, list[int]]:
        """The tokens of a conversation, with labels on those of the answers and -100 elsewhere."""

        def render(count: int, ask: bool) -> str:
            try:
                text: str = processor.apply_chat_template(
                    messages[:count], chat_template=template, tokenize=False, add_generation_prompt=ask
                )
            except TemplateError as error:
                raise PeanutError(
                    f"the tokenizer's chat template refuses the conversation {_begin(messages)}: {error}",
                    "messages that fit the template",
                    "correct the row or set data.template: plain",
                ) from None
            return text

        text = render(len(messages), ask=False)
        answers: list[tuple[int, int]] = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = render(turn, ask=True), render(turn + 1, ask=False)
            if not (after.startswith(before) and text.startswith(after)):
                raise PeanutError(
                    f"the tokenizer's chat template rewrites earlier turns of the conversation {_begin(messages)}",
                    "a template in which a conversation only grows",
                    "set data.template: plain",
                )
            answers.append((len(before), len(after)))
        # Each part on its own: a prompt then has the same tokens here as when an answer is asked for, whatever the
        # tokenizer would merge across the border. A chat template writes the special tokens itself.
        tokens: list[int] = []
        labels: list[int] = []
        end = 0
        for start, stop in answers:
            prompt = processor(text[end:start], add_special_tokens=template is PLAIN and end == 0, verbose=False)[
                "input_ids"
            ]
            answer = processor(text[start:stop], add_special_tokens=False, verbose=False)["input_ids"]
            tokens += prompt + answer
            labels += [-100] * len(prompt) + answer
            end = stop
        tokens, labels = tokens[: self.data.max_length], labels[: self.data.max_length]
        return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}


def _begin(messages: list[Message]) -> str:
    return repr(messages[0]["content"][:40] + "…")


def _check_messages(messages: Any, row: int, source: str) -> None:
    whole = isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    )
    if not whole:
        raise PeanutError(
            f"row {row} of '{source}' holds no chat messages", "a list of {role, content}", "correct the row"
        )
    roles = [message["role"] for message in messages]
    if "assistant" not in roles[1:]:
        raise PeanutError(
            f"row {row} of '{source}' has the roles {', '.join(roles) or 'of nobody'}",
            "a question, then an answer of the role 'assistant'",
            "correct the row",
        )
