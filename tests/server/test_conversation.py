"""Messages, tools and reasoning in chat templates like those of Qwen3 and Llama 3."""

import json

import pytest
from byte_model import write_companions

from grinqh_jax.server.conversation import Conversations
from grinqh_jax.server.errors import APIError
from grinqh_jax.server.schema import ChatCompletion
from grinqh_jax.server.tool_choice import Calls
from grinqh_jax.text.tokenizer import Tokenizer

QWEN = """{%- if tools %}[tools: {{ tools | tojson }} between <tool_call> and </tool_call>]{% endif %}
{%- for m in messages %}<|turn|>{{ m.role }}: {{ m.content }}
{%- if m.reasoning_content is defined %}<think>{{ m.reasoning_content }}</think>{% endif %}
{%- for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }} {{ call.function.arguments.city }}
{%- endfor %}{% endfor %}
{%- if add_generation_prompt %}<|turn|>assistant:
{%- if enable_thinking is defined and not enable_thinking %}<think>

</think>{% endif %}{% endif %}"""
LLAMA = """{%- if tools %}ipython {"name": name, "parameters": values} {{ tools | length }}{% endif %}
{%- for m in messages %}<|turn|>{{ m.role }}: {{ m.content }}{% endfor %}"""
R1 = QWEN.replace("<|turn|>assistant:", "<|turn|>assistant:<think>\n")
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}},
}


@pytest.fixture
def conversations(tmp_path):
    def make(template):
        write_companions(tmp_path, chat=True)
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
        return Conversations(Tokenizer.load(tmp_path))

    return make


def text(conversations, **fields):
    body = ChatCompletion.model_validate(fields)
    prompt = conversations.prompt(body.messages, body.tools, body.chat_template_kwargs)
    return "".join(conversations._tokenizer.token_text(token) for token in prompt.tokens), prompt


def test_a_conversation_with_tools_reaches_the_template(conversations):
    qwen = conversations(QWEN)
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hot"}, {"type": "text", "text": "in Ulm?"}]},
        {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "30"},
    ]
    rendered, prompt = text(qwen, messages=messages, tools=[TOOL])
    tools, _, rest = rendered.partition(" between <tool_call> and </tool_call>]")
    assert json.loads(tools.removeprefix("[tools: ")) == [TOOL]
    assert rest == (
        "<|turn|>system: Be brief.<|turn|>user: Hot\nin Ulm?"
        "<|turn|>assistant: <think>Hm.</think><tool_call>weather Ulm<|turn|>tool: 30<|turn|>assistant:"
    )
    assert (qwen.tools, qwen.reasons, prompt.reasoning) == ("tags", True, "possible")


def test_enable_thinking_reaches_the_template(conversations):
    hello = [{"role": "user", "content": "Hi"}]
    rendered, prompt = text(
        conversations(QWEN), messages=hello, chat_template_kwargs={"enable_thinking": False}
    )
    assert rendered.endswith("<think>\n\n</think>")
    assert prompt.reasoning == "none"
    _, prompt = text(conversations(R1), messages=hello)
    assert prompt.reasoning == "begun"
    with pytest.raises(APIError, match="does not read enable_thinking"):
        text(conversations(LLAMA), messages=hello, chat_template_kwargs={"enable_thinking": False})


def test_formats_of_calls(conversations):
    assert conversations(LLAMA).tools == "json"
    assert conversations("{{ messages }}").tools is None
    assert conversations("{{ messages }} {{ tools }}").tools is None
    body = {"messages": [{"role": "user", "content": "Hi"}], "tools": [TOOL]}
    with pytest.raises(APIError, match="tools are not supported"):
        text(conversations("{{ messages }} {{ tools }}"), **body)
    nothing = Calls.of(ChatCompletion.model_validate(body | {"tool_choice": "none"}))
    parser = conversations(LLAMA).parser(text(conversations(LLAMA), **body)[1], nothing)
    assert [delta.text for delta in parser.push('{"name": "weather"}')] == ['{"name": "weather"}']


def test_what_a_template_rejects_is_an_error_of_the_request(conversations):
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(APIError, match="messages: roles must alternate") as error:
        text(conversations(template), messages=[{"role": "user", "content": "Hi"}])
    assert (error.value.status, error.value.param) == (400, "messages")
    broken = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "["}}
    with pytest.raises(APIError, match="arguments of a tool call are not a JSON object"):
        text(conversations(QWEN), messages=[{"role": "assistant", "tool_calls": [broken]}])


def test_names_reach_the_template_and_parsed_fields_of_the_client_do_not(conversations):
    named = conversations("{% for m in messages %}<|turn|>{{ m.name }}: {{ m | length }}{% endfor %}")
    function = {"name": "f", "arguments": "{}", "parsed_arguments": {}}
    messages = [
        {"role": "user", "content": "Hi", "name": "Ann"},
        {
            "role": "assistant",
            "content": "",
            "parsed": None,
            "tool_calls": [{"id": "1", "function": function}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "3", "name": "f"},
    ]
    assert text(named, messages=messages)[0] == "<|turn|>Ann: 3<|turn|>: 3<|turn|>f: 4"
