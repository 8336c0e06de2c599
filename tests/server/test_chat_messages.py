"""Reasoning and calls in the messages and in the events of a chat, as OpenAI's client reads them."""

from openai.types.chat import ChatCompletionMessage
from openai.types.chat.chat_completion_chunk import ChoiceDelta

from grinqh_jax.server.answer_parser import AnswerParser
from grinqh_jax.server.chat import _deltas, _message

TEXT = (
    '<think>\nHm.\n</think>\n\nI look.<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>\n'
    '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
)


def parser() -> AnswerParser:
    return AnswerParser(reasons=True, tools="tags", names=["f", "g"])


def test_a_message_with_reasoning_and_calls():
    one = parser()
    message = _message(one.push(TEXT) + one.flush())
    read = ChatCompletionMessage.model_validate(message)
    assert (read.role, read.content, message["reasoning_content"]) == ("assistant", "I look.", "Hm.")
    assert [(call.type, call.function.name, call.function.arguments) for call in read.tool_calls] == [
        ("function", "f", '{"a": 1}'),
        ("function", "g", "{}"),
    ]
    assert len({call.id for call in read.tool_calls}) == 2


def test_a_message_of_calls_alone_has_no_content():
    one = parser()
    assert _message(one.push(TEXT[TEXT.index("<tool_call>") :]))["content"] is None
    assert _message([]) == {"role": "assistant", "content": ""}


def test_events_number_the_calls():
    one, content, reasoning, calls = parser(), "", "", {}
    for character in TEXT:
        for fields in _deltas(one.push(character)):
            delta = ChoiceDelta.model_validate(fields)
            content += delta.content or ""
            reasoning += fields.get("reasoning_content", "")
            for call in delta.tool_calls or ():
                calls[call.index] = (call.function.name, call.function.arguments, call.id)
    assert (content, reasoning) == ("I look.", "Hm.")
    assert [calls[i][:2] for i in range(2)] == [("f", '{"a": 1}'), ("g", "{}")]
    assert calls[0][2] != calls[1][2]
