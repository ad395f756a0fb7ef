"""What each task makes of its rows: classes, tokens, and which of them are learned."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers as hf

from peanut import PeanutError
from peanut.training.data import read_rows
from peanut.training.sections import DataSection
from peanut.training.tasks import TASKS, CausalLM, Instruction, Task, TextClassification, positions
from peanut.training.tasks.instruction import PLAIN


def rows(**columns: list[Any]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


def task(name: str, **data: Any) -> Task:
    return TASKS[name](DataSection(train="train", **data))


@pytest.fixture(scope="module")
def bert_tokenizer(minilm: Path) -> Any:
    return hf.AutoTokenizer.from_pretrained(minilm)


@pytest.fixture(scope="module")
def llama_tokenizer(smollm2: Path) -> Any:
    return hf.AutoTokenizer.from_pretrained(smollm2)


# Classes


@pytest.mark.parametrize(
    ("labels", "classes", "ids"),
    [
        (["pos", "neg", "pos"], ["neg", "pos"], [1, 0, 1]),
        ([10, 9, 10], ["9", "10"], [1, 0, 1]),
        ([True, False, True], ["False", "True"], [1, 0, 1]),
    ],
)
def test_classes_are_learned_from_names_and_numbers(labels: list[Any], classes: list[str], ids: list[int]) -> None:
    own = task("text-classification")
    data = rows(text=["a", "b", "c"], label=labels)
    own.learn(data, "train")
    assert own.labels == classes
    assert own.targets(data, "train") == ids  # type: ignore[attr-defined]


def test_a_dataset_that_names_its_classes_keeps_their_order() -> None:
    feature = datasets.ClassLabel(names=["pos", "neg", "unused"])
    data = rows(text=["a", "b"], label=[1, 0]).cast_column("label", feature)
    own = task("text-classification")
    own.learn(data, "train")
    assert own.labels == ["pos", "neg"]
    other = rows(text=["a"], label=[0]).cast_column("label", datasets.ClassLabel(names=["neg", "pos"]))
    assert own.targets(other, "eval") == [1]  # type: ignore[attr-defined]


def test_a_model_that_knows_the_classes_keeps_their_order() -> None:
    own = TextClassification(DataSection(train=""), ["neg", "pos"])
    config = hf.BertConfig(id2label={0: "pos", 1: "neg"})
    own.fit(config, None)
    assert own.labels == ["pos", "neg"]
    assert config.label2id == {"pos": 0, "neg": 1}


@pytest.mark.parametrize(
    ("name", "data", "options", "message"),
    [
        ("text-classification", {"text": ["a"], "y": [0]}, {}, "'train' has no column 'label' (it has 'text', 'y')"),
        ("text-classification", {"text": ["a", "b"], "label": [0, None]}, {}, "row 2 of 'train' has no 'label'"),
        ("text-classification", {"text": ["a", "b"], "label": [1, 1]}, {}, "every row of 'train' has the label '1'"),
        (
            "text-classification",
            {"text": ["a", "b"], "label": [0.5, 1.0]},
            {},
            "column 'label' of 'train' holds double",
        ),
        ("text-classification", {"text": ["a"], "label": [0]}, {"text_pair": "b"}, "'train' has no column 'b'"),
        (
            "text-regression",
            {"text": ["a"], "label": ["x"]},
            {},
            "column 'label' of 'train' holds string; expected numbers",
        ),
        (
            "text-regression",
            {"text": ["a"], "label": [float("nan")]},
            {},
            "row 1 of 'train' has the label nan; expected a finite number",
        ),
        ("causal-lm", {"content": ["a"]}, {}, "'train' has no column 'text'"),
        ("image-classification", {"image": ["a.png"], "label": [0]}, {}, "column 'image' of 'train' holds"),
        ("instruction", {"a": ["x"]}, {}, "'train' has the columns 'a'; expected messages; or prompt and completion"),
        ("instruction", {"prompt": ["x"]}, {"prompt": "prompt"}, "'train' has no column 'completion'"),
        ("instruction", {"messages": ["x"]}, {}, "row 1 of 'train' holds no chat messages"),
        ("instruction", {"messages": [[{"role": "user", "content": "x"}]]}, {}, "row 1 of 'train' has the roles user"),
    ],
)
def test_refuses(name: str, data: dict[str, list[Any]], options: dict[str, str], message: str) -> None:
    with pytest.raises(PeanutError) as caught:
        task(name, **options).learn(rows(**data), "train")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_label_that_training_has_not_seen_is_named_with_its_row() -> None:
    own = TextClassification(DataSection(train=""), ["bad", "good"])
    with pytest.raises(PeanutError) as caught:
        own.check(rows(text=["a", "b"], label=["good", "goood"]), "eval.csv")
    assert str(caught.value) == (
        "row 2 of 'eval.csv' has the label 'goood', which training has not seen; expected one of 'bad', 'good'; "
        "correct the row or add such rows to the training data (nearest: 'good')"
    )


# Tokens


def test_pairs_are_encoded_as_the_tokenizer_does(bert_tokenizer: Any) -> None:
    own = task("text-classification", text="a", text_pair="b", max_length=8)
    data = rows(a=["one two", "three"], b=["four five six seven eight nine", "x"], label=[0, 1])
    own.learn(data, "train")
    encoded = own.encode(data, bert_tokenizer, "train")
    expected = bert_tokenizer(["one two", "three"], data["b"][:], truncation=True, max_length=8)
    assert encoded["input_ids"][:] == expected["input_ids"]
    assert encoded["token_type_ids"][:] == expected["token_type_ids"]
    assert encoded["labels"][:] == [0, 1]
    batch = own.collator(bert_tokenizer)(encoded.to_list())
    assert batch["input_ids"].shape == (2, 8)


def test_plain_text_is_packed_without_loss(llama_tokenizer: Any) -> None:
    own = CausalLM(DataSection(train="", max_length=6))
    texts = ["A short first text.", "A second one, somewhat longer than the first."]
    pieces = own.encode(rows(text=texts), llama_tokenizer, "train")
    assert [len(piece) for piece in pieces["input_ids"]][:-1] == [6] * (len(pieces) - 1)
    joined = [token for piece in pieces["input_ids"] for token in piece]
    end = llama_tokenizer.eos_token
    assert llama_tokenizer.decode(joined) == f"{texts[0]}{end}{texts[1]}{end}"
    assert pieces["labels"][:] == pieces["input_ids"][:]
    batch = own.collator(llama_tokenizer)(pieces.to_list())
    assert (batch["labels"][-1] == -100).sum() == 6 - len(pieces[-1]["input_ids"])


def test_too_little_text_is_refused(llama_tokenizer: Any) -> None:
    with pytest.raises(PeanutError, match="fewer than two tokens"):
        CausalLM(DataSection(train="")).encode(rows(text=[""]), llama_tokenizer, "train")


def test_an_encoder_is_refused_for_language_modelling(bert_tokenizer: Any) -> None:
    with pytest.raises(PeanutError, match="the model is a bert, which is no left-to-right decoder"):
        CausalLM(DataSection(train="")).fit(hf.BertConfig(), bert_tokenizer)


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (hf.BertConfig(), 512),
        (hf.RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
        (hf.GPT2Config(n_positions=64), 64),
        (hf.T5Config(), None),
        (hf.EsmConfig(vocab_size=9, max_position_embeddings=64, pad_token_id=3, mask_token_id=2), 60),
        (
            hf.EsmConfig(
                vocab_size=9,
                max_position_embeddings=64,
                pad_token_id=3,
                mask_token_id=2,
                position_embedding_type="rotary",
            ),
            64,
        ),
        (hf.LukeConfig(max_position_embeddings=64, pad_token_id=1), 62),
        (hf.MarkupLMConfig(max_position_embeddings=64, pad_token_id=1), 62),
        (hf.LiltConfig(max_position_embeddings=64, pad_token_id=1), 62),
        (hf.LayoutLMv3Config(max_position_embeddings=64, pad_token_id=1), 62),
    ],
    ids=lambda each: getattr(each, "model_type", ""),
)
def test_how_many_tokens_a_model_has_positions_for(config: hf.PreTrainedConfig, longest: int | None) -> None:
    assert positions(config) == longest


def test_max_length_beyond_the_model_is_refused(bert_tokenizer: Any) -> None:
    with pytest.raises(PeanutError, match=r"data.max_length is 513; expected at most the model's 512"):
        task("text-classification", max_length=513).fit(hf.BertConfig(), bert_tokenizer)


# Answers

FORMS: dict[str, dict[str, list[Any]]] = {
    "messages": {
        "messages": [[{"role": "user", "content": "2 + 2?\n\nBriefly."}, {"role": "assistant", "content": "Four."}]]
    },
    "prompt": {"prompt": ["2 + 2?\n\nBriefly."], "completion": ["Four."]},
    "instruction": {"instruction": ["2 + 2?"], "input": ["Briefly."], "output": ["Four."]},
}


def learned(encoded: dict[str, list[int]], tokenizer: Any) -> str:
    return str(tokenizer.decode([token for token in encoded["labels"] if token != -100]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("template", ["chat", "plain"])
def test_the_three_forms_say_the_same_and_only_the_answer_is_learned(
    llama_tokenizer: Any, form: str, template: str
) -> None:
    own = task("instruction", template=template)
    own.learn(rows(**FORMS[form]), "train")
    (encoded,) = own.encode(rows(**FORMS[form]), llama_tokenizer, "train").to_list()
    text = llama_tokenizer.decode(encoded["input_ids"])
    if template == "chat":
        assert text.endswith("<|im_start|>user\n2 + 2?\n\nBriefly.<|im_end|>\n<|im_start|>assistant\nFour.<|im_end|>\n")
        assert learned(encoded, llama_tokenizer) == "Four.<|im_end|>\n"
    else:
        assert text == "2 + 2?\n\nBriefly.\n\nFour.<|im_end|>"
        assert learned(encoded, llama_tokenizer) == "Four.<|im_end|>"


def test_columns_may_have_other_names(llama_tokenizer: Any) -> None:
    own = task("instruction", prompt="question", completion="answer", template="plain")
    data = rows(question=["Why?"], answer=["Because."], messages=["not looked at"])
    own.learn(data, "train")
    (encoded,) = own.encode(data, llama_tokenizer, "train").to_list()
    assert learned(encoded, llama_tokenizer) == "Because.<|im_end|>"


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_every_answer_of_a_conversation_is_learned(llama_tokenizer: Any, template: str) -> None:
    words = [("user", "Hi."), ("assistant", "Hello!"), ("user", "Bye."), ("assistant", "See you.")]
    data = rows(messages=[[{"role": role, "content": content} for role, content in words]])
    (encoded,) = task("instruction", template=template).encode(data, llama_tokenizer, "train").to_list()
    text = learned(encoded, llama_tokenizer).replace("\n", "")
    assert text == "Hello!<|im_end|>See you.<|im_end|>"


def test_answering_begins_where_learning_began(llama_tokenizer: Any) -> None:
    for template in ("chat", "plain"):
        own = Instruction(DataSection(train="", template=template))
        (encoded,) = own.encode(rows(**FORMS["prompt"]), llama_tokenizer, "train").to_list()
        text, special = own.question("2 + 2?\n\nBriefly.", llama_tokenizer)
        prompt = llama_tokenizer(text, add_special_tokens=special)["input_ids"]
        assert encoded["input_ids"][: len(prompt)] == prompt
        assert encoded["labels"][: len(prompt)] == [-100] * len(prompt)
        assert encoded["labels"][len(prompt)] != -100


def test_an_answer_ends_with_the_special_token_that_the_template_puts_there(llama_tokenizer: Any) -> None:
    ends = {
        "chat": llama_tokenizer.chat_template,
        "other": "{% for m in messages %}{{ m['content'] }} <|endoftext|>\n{% endfor %}",
        "none": "{% for m in messages %}{{ m['content'] }}\n{% endfor %}",
        "rewritten": "{{ messages[-1]['content'] }}<|endoftext|>",
    }
    tokens = {}
    for name, template in ends.items():
        tokenizer = copy.copy(llama_tokenizer)
        tokenizer.chat_template = template
        tokens[name] = Instruction(DataSection(train="")).end_token(tokenizer)
    end = llama_tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert tokens == {"chat": end[0], "other": end[1], "none": None, "rewritten": None}
    assert Instruction(DataSection(train="", template="plain")).end_token(llama_tokenizer) == end[0]


def test_a_tokenizer_without_a_template_takes_the_plain_one(bert_tokenizer: Any) -> None:
    own = Instruction(DataSection(train=""))
    assert own.template(bert_tokenizer) is PLAIN
    with pytest.raises(PeanutError, match=r"data.template is 'chat'; expected a tokenizer with a chat template"):
        Instruction(DataSection(train="", template="chat")).template(bert_tokenizer)


def test_answers_beyond_max_length_are_left_out_and_counted(llama_tokenizer: Any) -> None:
    data = rows(prompt=["word " * 50, "a"], completion=["x", "b"])
    own = task("instruction", template="plain", max_length=16)
    assert len(own.encode(data, llama_tokenizer, "train")) == 1
    assert own.dropped == 1
    with pytest.raises(PeanutError, match="no answer of 'train' starts within 16 tokens"):
        own.encode(data.select([0]), llama_tokenizer, "train")


def test_a_template_that_rewrites_earlier_turns_is_refused(llama_tokenizer: Any) -> None:
    own = Instruction(DataSection(train=""))
    last_only = "{{ messages[-1]['content'] }}"
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(PeanutError, match="rewrites earlier turns of the conversation 'q…'"):
        own.encode_one(messages, llama_tokenizer, last_only)


def test_a_template_that_refuses_is_told_in_one_line(llama_tokenizer: Any) -> None:
    own = Instruction(DataSection(train=""))
    messages = [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(PeanutError, match="chat template refuses the conversation 's…': no system here"):
        own.encode_one(messages, llama_tokenizer, "{{ raise_exception('no system here') }}")


# Images


def test_images_become_pixels_and_classes(digits: Path, vit: Path) -> None:
    own = task("image-classification")
    data = read_rows(str(digits))
    own.learn(data, "digits")
    processor = own.load_processor(vit)
    own.fit(hf.AutoConfig.from_pretrained(vit), processor)
    encoded = own.encode(data.select([0, 47]), processor, "digits")
    batch = own.collator(processor)([encoded[0], encoded[1]])
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert batch["labels"].tolist() == [0, 3]
    assert own.labels == ["digit-0", "digit-1", "digit-2", "digit-3"]
