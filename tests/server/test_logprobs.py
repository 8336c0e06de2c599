"""Log-probabilities in the shape of text completions: names and positions of tokens."""

import pytest
from byte_model import SPECIAL, write_companions

from grinqh_jax.server.logprobs import TextOffsets, completion_logprobs
from grinqh_jax.text.tokenizer import Tokenizer

TEXT = "Köln 日本 😀\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    write_companions(directory, chat=False)
    return Tokenizer.load(directory)


@pytest.mark.parametrize("part", [1, 2, 3, 100])
def test_a_token_is_at_its_character_in_any_parts_of_a_text(tokenizer, part):
    tokens = [(token, -1.0, None) for token in tokenizer.encode(TEXT)]
    offsets, found = TextOffsets(tokenizer, ""), []
    for start in range(0, len(tokens), part):
        found += completion_logprobs(tokens[start : start + part], tokenizer, offsets, False)["text_offset"]
    expected = [i for i, character in enumerate(TEXT) for _ in character.encode()]
    assert found == expected


def test_special_tokens_have_no_text_except_in_what_the_client_sent(tokenizer):
    begin, end = (tokenizer.encode(special)[0] for special in SPECIAL)
    prompt = f"a{SPECIAL[1]}b"
    tokens = [
        begin,
        *tokenizer.encode(prompt),
        end,
        *tokenizer.encode("c"),
    ]  # the first as a tokenizer adds it
    offsets = TextOffsets(tokenizer, prompt)
    assert [offsets.next(token) for token in tokens] == [
        0,
        0,
        1,
        1 + len(SPECIAL[1]),
        len(prompt),
        len(prompt),
    ]


def test_each_alternative_has_a_name_and_the_token_is_among_them(tokenizer):
    most, other, chosen = tokenizer.encode("日")
    fields = completion_logprobs(
        [(chosen, -3.0, [(most, -1.0), (other, -2.0)])], tokenizer, TextOffsets(tokenizer, ""), True
    )
    assert fields["tokens"] == [r"bytes:\xa5"]
    assert fields["top_logprobs"] == [{r"bytes:\xe6": -1.0, r"bytes:\x97": -2.0, r"bytes:\xa5": -3.0}]
