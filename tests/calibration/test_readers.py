# SPDX-License-Identifier: Apache-2.0
"""A row of each data set of the table, with the columns that it has on the Hub, becomes the text that one would read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from transformers import AutoTokenizer

from optimum_calibprune import pocket
from optimum_calibprune.calibration.readers import READERS, document
from optimum_calibprune.calibration.sources import SOURCES
from optimum_calibprune.records import CAPABILITIES, CalibrationSource


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
)
CHAT = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]

ARC = {
    "id": "Mercury_7",
    "question": "Which gas do plants take in?",
    "choices": {"text": ["oxygen", "carbon dioxide", "helium"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}
WINOGRANDE = {
    "sentence": "The cup fell off the shelf because the _ was tilted.",
    "option1": "cup",
    "option2": "shelf",
    "answer": "2",
}
HELLASWAG = {
    "ind": 24,
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he",
    "endings": ["is ripping off tiles.", "is singing.", "starts to swim.", "holds a cube."],
    "source_id": "activitynet~v_x",
    "split": "val",
    "label": "0",
}
PIQA = {"goal": "Dry a wet shoe", "sol1": "Stuff it with newspaper.", "sol2": "Freeze it.", "label": 0}
GSM8K = {"question": "Ann has 3 pens and buys 4. How many?", "answer": "She has 3+4=<<3+4=7>>7 pens.\n#### 7"}
MBPP = {
    "task_id": 601,
    "text": "Write a function to add two numbers.",
    "code": "def add(a, b):\n    return {a: b}[a] + a",
    "test_list": ["assert add(1, 1) == 2", "assert add(0, 1) == 1"],
    "test_setup_code": "",
    "challenge_test_list": [],
}
MATH = {"problem": "Find $x$ in $x^{2}=4$, $x>0$.", "level": "Level 1", "type": "Algebra", "solution": r"$\boxed{2}$"}

READ: dict[str, tuple[dict[str, Any], str]] = {
    "c4": ({"text": "A {page} of text.", "timestamp": "2019", "url": "http://a"}, "A {page} of text."),
    "fineweb_edu": (
        {"text": "Why the sky is blue.", "id": "<urn>", "dump": "CC", "score": 3.1},
        "Why the sky is blue.",
    ),
    "dclm": ({"text": "A page.", "url": "http://a", "fasttext_score": 0.2}, "A page."),
    "dolly": (
        {
            "instruction": "Who was he?",
            "context": "Bell was an inventor.",
            "response": "An inventor.",
            "category": "qa",
        },
        "Who was he?\n\nBell was an inventor.\n\nAn inventor.",
    ),
    "commonsense_qa": (
        {
            "id": "1a",
            "question": "Where is a cup kept?",
            "question_concept": "cup",
            "choices": {"label": ["A", "B", "C", "D", "E"], "text": ["sea", "cupboard", "sky", "road", "fire"]},
            "answerKey": "B",
        },
        "Question: Where is a cup kept?\nAnswer: cupboard",
    ),
    "code_alpaca": (
        {"instruction": "Add them.", "input": "1 and 2", "output": "1 + 2"},
        "Add them.\n\n1 and 2\n\n1 + 2",
    ),
    "python": (
        {"repo_name": "a/b", "path": "a.py", "copies": "1", "size": "5", "content": "x = 1", "license": "mit"},
        "x = 1",
    ),
    "metamath": (
        {
            "type": "GSM_Rephrased",
            "query": "What is 2+2?",
            "original_question": "2+2?",
            "response": "The answer is: 4",
        },
        "What is 2+2?\n\nThe answer is: 4",
    ),
    "open_web_math": ({"url": "http://a", "text": "Let $x=1$.", "date": "2021", "metadata": "{}"}, "Let $x=1$."),
    "wikitext2": ({"page": " = Robert Boulter = \n\n An actor ."}, " = Robert Boulter = \n\n An actor ."),
    "ultrachat": (
        {"prompt": "What is 2 + 2?", "prompt_id": "f", "messages": CHAT},
        "<user>What is 2 + 2?</user><assistant>4</assistant>",
    ),
    "arc": (ARC, "Question: Which gas do plants take in?\nAnswer: carbon dioxide"),
    "winogrande": (WINOGRANDE, "The cup fell off the shelf because the shelf was tilted."),
    "hellaswag": (HELLASWAG, "A man is sitting on a roof. he is ripping off tiles."),
    "piqa": (PIQA, "Question: Dry a wet shoe\nAnswer: Stuff it with newspaper."),
    "evol_codealpaca": ({"instruction": "Say hello.", "output": "print('hello')"}, "Say hello.\n\nprint('hello')"),
    "mbpp": (
        MBPP,
        "Write a function to add two numbers.\n\ndef add(a, b):\n    return {a: b}[a] + a\n\n"
        "assert add(1, 1) == 2\nassert add(0, 1) == 1",
    ),
    "gsm8k": (
        GSM8K,
        "Question: Ann has 3 pens and buys 4. How many?\nAnswer: She has 3+4=7 pens.\n#### 7",
    ),
    "hendrycks_math": (MATH, "Find $x$ in $x^{2}=4$, $x>0$.\n\n$\\boxed{2}$"),
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    made = AutoTokenizer.from_pretrained(pocket.MODEL)
    made.chat_template = TEMPLATE
    return made


def source(text: str) -> CalibrationSource:
    return CalibrationSource("a", "general", text=text)


@pytest.mark.parametrize("name", SOURCES)
def test_a_row_of_each_source_of_the_table(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    row, expected = READ[name]
    assert document(SOURCES[name], row, tokenizer) == expected


def test_every_reader_serves_a_source_of_the_table() -> None:
    assert READERS.keys() == {s.text for s in SOURCES.values() if "{" not in s.text and ":" not in s.text}


def test_the_other_answers_are_found_too(tokenizer: PreTrainedTokenizerBase) -> None:
    assert document(SOURCES["piqa"], PIQA | {"label": 1}, tokenizer).endswith("Freeze it.")
    assert document(SOURCES["winogrande"], WINOGRANDE | {"answer": "1"}, tokenizer).endswith("the cup was tilted.")
    assert document(SOURCES["hellaswag"], HELLASWAG | {"label": "3"}, tokenizer).endswith("he holds a cube.")
    letters = {"text": ["oxygen", "carbon dioxide"], "label": ["A", "B"]}
    assert document(SOURCES["arc"], ARC | {"choices": letters, "answerKey": "A"}, tokenizer).endswith("oxygen")


def test_parts_that_an_instruction_lacks_leave_no_gap(tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"instruction": "Say hello.", "input": "", "output": "hello"}
    assert document(SOURCES["code_alpaca"], row, tokenizer) == "Say hello.\n\nhello"
    row = {"instruction": "Say hello.", "context": None, "response": "hello"}
    assert document(SOURCES["dolly"], row, tokenizer) == "Say hello.\n\nhello"


def test_code_under_another_licence_is_no_document(tokenizer: PreTrainedTokenizerBase) -> None:
    for licence in ("gpl-3.0", "", None):
        assert document(SOURCES["python"], {"content": "x = 1", "license": licence}, tokenizer) == ""


def test_the_table_serves_every_capability(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(SOURCES) >= 15
    capabilities = [source.capability for source in SOURCES.values()]
    assert all(capabilities.count(capability) >= 4 for capability in CAPABILITIES)
    assert len({source.repo for source in SOURCES.values()}) == len(SOURCES)


def test_all_marks_of_the_calculator_go(tokenizer: PreTrainedTokenizerBase) -> None:
    answer = {"answer": "2*3=<<2*3=6>>6 and 6<7, 6>5, 6/2=<<6/2=3>>3"}
    assert document(SOURCES["gsm8k"], GSM8K | answer, tokenizer).endswith("2*3=6 and 6<7, 6>5, 6/2=3")


def test_a_chat_without_template_is_joined_by_blank_lines() -> None:
    bare = AutoTokenizer.from_pretrained(pocket.MODEL)
    assert not bare.chat_template
    assert document(source("chat:messages"), {"messages": CHAT}, bare) == "What is 2 + 2?\n\n4"


def test_a_template_takes_columns_and_what_is_in_them(tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"title": "A", "year": 1999, "body": {"text": "b"}, "tags": ["x", "y"]}
    assert document(source("{title} ({year}): {body[text]} {tags[1]}"), row, tokenizer) == "A (1999): b y"


def test_texts_and_token_ids_are_documents_already(tokenizer: PreTrainedTokenizerBase) -> None:
    assert document(source("arc"), "as it is {x}", tokenizer) == "as it is {x}"
    assert document(source("arc"), (1, 2), tokenizer) == [1, 2]
    assert document(source("arc"), {"input_ids": [3], "labels": [4]}, tokenizer) == [3]


def test_padding_of_token_ids_is_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    masked = {"input_ids": [9, 9, 3, 4, 9], "attention_mask": [0, 0, 1, 1, 0]}
    assert document(source("arc"), masked, tokenizer) == [3, 4]
    assert document(source("arc"), {"input_ids": [3, 4], "attention_mask": None}, tokenizer) == [3, 4]
    with pytest.raises(ValueError, match="2 input_ids but 3 in attention_mask"):
        document(source("arc"), {"input_ids": [3, 4], "attention_mask": [1, 1, 0]}, tokenizer)


def test_a_token_that_only_pads_is_left_out_at_either_end() -> None:
    padding = AutoTokenizer.from_pretrained(pocket.MODEL)
    padding.pad_token = padding.eos_token
    end, pad = padding.eos_token_id, 7
    assert document(source("arc"), [end, 3, end], padding) == [end, 3, end]  # it also ends documents
    padding.pad_token = padding.convert_ids_to_tokens(pad)
    for row in ([pad, pad, 3, pad, 4, pad], {"input_ids": [3, pad, 4]}):
        assert document(source("arc"), row, padding) == [3, pad, 4]
    assert document(source("arc"), [pad, pad], padding) == []


@pytest.mark.parametrize(("text", "row"), [("{text}", {"text": None}), ("chat:messages", {"messages": None})])
def test_a_null_is_an_empty_document(text: str, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    assert document(source(text), row, tokenizer) == ""
    assert document(source("{a}{b}"), {"a": "x", "b": None}, tokenizer) == ""


@pytest.mark.parametrize(
    ("text", "row", "said"),
    [
        ("{text}", {"txt": "x", "id": 1}, "'text' is missing. Its columns are: txt, id."),
        ("{text}", {}, "'text' is missing. Its columns are: none."),
        ("{text}", {"text": ["a"]}, "'text' holds a list, not a text. Its columns are: text."),
        ("{text}", {"text": {"a": 1}}, "'text' holds a dict, not a text"),
        ("{text[a]}", {"text": {"b": 1}}, "'a' is missing"),
        ("{text.a}", {"text": "x"}, "'str' object has no attribute 'a'"),
        ("{text", {"text": "x"}, "expected '}' before end of string"),
        ("text", {"text": "x"}, "Unknown reader 'text'. Allowed: arc, winogrande,"),
        ("gsm8", GSM8K, "Unknown reader 'gsm8'. Did you mean 'gsm8k'?"),
        ("chat:messages", {"chat": CHAT}, "'messages' is missing. Its columns are: chat."),
        (
            "chat:messages",
            {"messages": [{"role": "system", "content": "x"}]},
            "the chat template refuses it (No system",
        ),
        ("arc", ARC | {"answerKey": "9"}, "'9' is not in list"),
        ("winogrande", WINOGRANDE | {"answer": ""}, "'option' is missing"),
        ("hellaswag", HELLASWAG | {"label": ""}, "invalid literal for int()"),
        ("hellaswag", HELLASWAG | {"label": "7"}, "list index out of range"),
        ("gsm8k", GSM8K | {"answer": None}, "expected string"),
    ],
)
def test_a_row_that_does_not_fit_is_explained(
    text: str, row: dict[str, Any], said: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ValueError) as error:
        document(source(text), row, tokenizer)
    assert str(error.value).startswith(f"A row of source 'a' does not fit {text!r}: {said}")


@pytest.mark.parametrize("label", [-1, "", None, 2])
def test_a_row_without_an_answer_is_not_read_as_one_with(label: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="does not fit 'piqa'"):
        document(source("piqa"), PIQA | {"label": label}, tokenizer)
    with pytest.raises(ValueError, match="does not fit 'hellaswag'"):
        document(source("hellaswag"), HELLASWAG | {"endings": ["x"], "label": label}, tokenizer)
