"""Calibration documents: conversations in the model's own chat format, and the collection ``mixed``."""

import collections
import itertools
import json

import pytest
import tokenizers
from byte_model import write_companions
from tokenizers import models, pre_tokenizers, processors

from checkpoints_tools.calibration import documents
from grinqh_jax.errors import UsageError
from grinqh_jax.text.tokenizer import Tokenizer

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.fixture
def chat_tokenizer(tmp_path):
    write_companions(tmp_path, chat=True)
    return Tokenizer.load(tmp_path)


def test_records_of_each_form(tmp_path):
    path = tmp_path / "mixed.jsonl"
    records = [{"text": "prose"}, {"question": "1+1?", "answer": "2"}, {"messages": TURNS}]
    path.write_text("\n".join(map(json.dumps, records)))
    assert documents.read(path) == ["prose", "Question: 1+1?\nAnswer: 2", TURNS]
    (tmp_path / "plain.txt").write_text("one text\n\nof two paragraphs")
    assert documents.read(tmp_path / "plain.txt") == ["one text\n\nof two paragraphs"]


@pytest.mark.parametrize("messages", [[], "hi", [{"role": "user"}], [{"role": 1, "content": "x"}]])
def test_bad_conversations_are_named(messages, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"text": "good"}) + "\n" + json.dumps({"messages": messages}))
    with pytest.raises(UsageError, match=r"line 2: expected a JSON object with .* a list under messages"):
        documents.read(path)


def test_a_conversation_is_written_with_the_chat_template(chat_tokenizer):
    assert documents.render(TURNS, chat_tokenizer) == "<|turn|>user: hi\n<|turn|>assistant: hello\n"
    assert documents.render("text", chat_tokenizer) == "text"


def test_without_a_template_turns_begin_with_their_role(tmp_path):
    write_companions(tmp_path, chat=False)
    assert documents.render(TURNS, Tokenizer.load(tmp_path)) == "User: hi\n\nAssistant: hello"


def test_a_template_that_refuses_the_roles_is_not_used(chat_tokenizer, tmp_path):
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ raise_exception('no') }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert documents.render(TURNS, Tokenizer.load(tmp_path)) == "User: hi\n\nAssistant: hello"


def test_the_bos_token_of_a_template_is_removed(tmp_path):
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    template = "<s>{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.bos_text == "<s>"
    assert documents.render(TURNS, loaded) == "[hi][hello]"


def test_a_tokenizer_without_bos_has_no_text_for_it(chat_tokenizer):
    assert chat_tokenizer.bos_text is None


def test_every_part_of_the_mixed_collection_has_all_kinds():
    paths = sorted(documents.MIXED_DOCUMENTS.glob("*.jsonl"))
    kinds = {path.stem: [json.dumps(document) for document in documents.read(path)] for path in paths}
    assert {"arithmetic", "code", "dialogue", "instructions", "languages", "prose"} <= kinds.keys()
    found = [json.dumps(document) for document in documents.mixed()]
    assert collections.Counter(found) == collections.Counter(itertools.chain(*kinds.values()))
    for kind, members in kinds.items():
        half = sum(document in members for document in found[: len(found) // 2])
        assert abs(half - len(members) / 2) <= 1, kind
    for document in documents.read(documents.MIXED_DOCUMENTS / "instructions.jsonl"):
        assert [turn["role"] for turn in document] == ["user", "assistant"] * (len(document) // 2)


def test_each_sequence_is_spread_evenly():
    # a to f are placed at 1/12, 3/12, ..., 11/12; 1 and 2 at 1/4 and 3/4; x at 1/2. Ties keep the order.
    assert documents.spread(["abcdef", "12", "x"]) == ["a", "b", "1", "c", "x", "d", "e", "2", "f"]
