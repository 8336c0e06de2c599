"""Tools in the call formats of Qwen3 and Llama 3, as OpenAI's official client uses them over a socket."""

import contextlib
import json
import shutil
import threading

import openai
import pytest
import uvicorn
from tokenizers import pre_tokenizers

from grinqh_jax.decoding.generator import Generator
from grinqh_jax.server import run
from grinqh_jax.server.app import application
from grinqh_jax.server.limits import Limits
from grinqh_jax.server.service import Service
from grinqh_jax.text.tokenizer import Tokenizer

MESSAGES = (
    "{% for m in messages %}<|turn|>{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
)
MESSAGES += "{{ c.function.arguments.c }}{% endfor %}{% endfor %}<|turn|>"
TEMPLATES = {
    "qwen": MESSAGES + "{# tools: <tool_call> #}",
    "llama": MESSAGES + '{# tools: ipython "parameters" #}',
    "r1": MESSAGES + "<think>{# tools: <tool_call> </think> #}",
}
"""Templates that name the parts of their format and write short prompts: the model has few positions."""

WEATHER = {
    "type": "function",
    "function": {
        "name": "w",
        "parameters": {
            "type": "object",
            "properties": {
                "c": {"$ref": "#/$defs/city"},
                "d": {"type": "integer", "minimum": 0, "maximum": 9},
            },
            "required": ["c"],
            "additionalProperties": False,
            "$defs": {"city": {"enum": ["Ulm", 'K"}öln']}},
        },
    },
}
STOP = {"type": "function", "function": {"name": "s"}}
TOOLS = [WEATHER, STOP]
FIELDS = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Hot?"}],
    "tools": TOOLS,
    "temperature": 1.0,
}

FORMS = ["server", pytest.param("llama", marks=pytest.mark.slow)]
"""The session's server, which has the form of Qwen3, and a server with that of Llama 3."""

NAMED = {"type": "function", "function": {"name": "w"}}


@contextlib.contextmanager
def listening(service: Service):
    """Runs a server on a socket in a thread."""
    bound = run.bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(application(service), log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        url = f"{run.url(bound)}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=2, timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def clients(chat_directory, library, library_engine, tmp_path_factory):
    """Clients of three servers on one engine, by the chat template."""
    with contextlib.ExitStack() as stack:

        def client(name: str) -> openai.OpenAI:
            directory = tmp_path_factory.mktemp(name)
            shutil.copy(chat_directory / "tokenizer.json", directory)
            config = json.loads((chat_directory / "tokenizer_config.json").read_text())
            config["chat_template"] = TEMPLATES[name]
            (directory / "tokenizer_config.json").write_text(json.dumps(config))
            tokenizer = Tokenizer.load(directory)
            generator = Generator(library.model, tokenizer, library.defaults, library.targets, directory)
            return stack.enter_context(listening(Service("tiny", generator, library_engine, Limits())))

        yield {name: client(name) for name in TEMPLATES}


@pytest.fixture
def form_client(request, form: str) -> openai.OpenAI:
    """The client of a server."""
    if form == "server":
        return request.getfixturevalue("client")
    return request.getfixturevalue("clients")[form]


def arguments_fit(call) -> bool:
    values = json.loads(call.function.arguments)
    if call.function.name == "s":
        return values == {}
    return values["c"] in ("Ulm", 'K"}öln') and set(values) <= {"c", "d"}


def streamed(client, **fields):
    """The choices of a streamed chat, from the client's own accumulation, and the events."""
    with client.chat.completions.stream(**fields) as stream:
        events = list(stream)
        return stream.get_final_completion().choices, events


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_forced_call_fits_its_schema_and_streams_as_it_is(form_client, choice):
    client = form_client
    fields = FIELDS | {"tool_choice": choice, "parallel_tool_calls": False, "n": 2, "seed": 5}
    answer = client.chat.completions.create(**fields)
    for one in answer.choices:
        (call,) = one.message.tool_calls
        assert (one.message.content, one.finish_reason) == (None, "tool_calls")
        assert arguments_fit(call)
        assert choice == "required" or call.function.name == "w"
    choices, events = streamed(client, **fields)
    for one, other in zip(choices, answer.choices, strict=True):
        assert one.finish_reason == "tool_calls"
        assert [call.function.name for call in one.message.tool_calls] == [
            call.function.name for call in other.message.tool_calls
        ]
        assert [call.function.arguments for call in one.message.tool_calls] == [
            call.function.arguments for call in other.message.tool_calls
        ]
    pieces = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert len(pieces) >= 3 * len(choices)  # one event for each decode step, and not one for the whole call


@pytest.mark.slow
@pytest.mark.parametrize("form", ["qwen", "llama"])
def test_several_calls_in_one_answer(clients, form):
    fields = FIELDS | {"tools": [STOP], "tool_choice": "required", "n": 4, "seed": 1}
    answer = clients[form].chat.completions.create(**fields)
    calls = [one.message.tool_calls or [] for one in answer.choices]
    assert max(map(len, calls)) > 1  # the model chooses at random whether there is another
    for each in calls:
        assert len({call.id for call in each}) == len(each)
    pieces: dict = {}
    for event in clients[form].chat.completions.create(**fields, stream=True):
        (one,) = event.choices
        for call in one.delta.tool_calls or ():
            pieces.setdefault((one.index, call.index), []).append(call)
    for (choice, index), (first, *rest) in pieces.items():
        call = calls[choice][index]
        assert (first.type, first.function.name, first.id[:5]) == ("function", call.function.name, "call_")
        assert "".join(each.function.arguments for each in [first, *rest]) == call.function.arguments
        assert {(each.id, each.function.name) for each in rest} == {(None, None)}
    assert len(pieces) == sum(map(len, calls))


def token(character: str) -> int:
    """Returns the token of an ASCII character in the tiny model of bytes."""
    return 2 + sorted(pre_tokenizers.ByteLevel.alphabet()).index(character)


@pytest.mark.parametrize("form", FORMS)
def test_without_a_choice_an_answer_is_text_or_a_strict_call(form_client, form):
    strict = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
    fields = FIELDS | {"tools": [strict], "seed": 3, "max_tokens": 20}
    texts = form_client.chat.completions.create(**fields, n=4)
    assert any(choice.message.content for choice in texts.choices)  # The random model may end at once.
    if form == "llama":  # A call begins with a brace, so a bias makes the model call.
        fields |= {"logit_bias": {str(token("{")): 100}, "max_tokens": 100, "parallel_tool_calls": False}
        (choice,) = form_client.chat.completions.create(**fields).choices
        assert [arguments_fit(call) for call in choice.message.tool_calls] == [True]
        assert choice.finish_reason == "tool_calls"


@pytest.mark.slow
def test_reasoning_comes_before_a_forced_call(clients):
    fields = FIELDS | {"tool_choice": NAMED, "max_tokens": 20, "seed": 0}
    (choice,) = clients["r1"].chat.completions.create(**fields).choices
    assert choice.message.reasoning_content  # The random model does not end it.
    assert not choice.message.content
    assert choice.message.tool_calls is None


def test_a_call_that_does_not_fit_the_limit_is_cut(client):
    fields = FIELDS | {"tool_choice": NAMED, "max_tokens": 48, "seed": 5}
    (choice,) = client.chat.completions.create(**fields).choices
    assert choice.finish_reason == "length"
    (call,) = choice.message.tool_calls
    assert call.function.arguments.startswith('{"c": "')


@pytest.mark.slow
@pytest.mark.parametrize("form", ["qwen", "llama"])
def test_a_conversation_with_calls_and_their_results(clients, form):
    client, messages = clients[form], [{"role": "user", "content": "a"}]
    fields = {"model": "tiny", "tools": TOOLS, "seed": 2, "temperature": 1.0}
    forced = fields | {"tool_choice": NAMED, "parallel_tool_calls": False}
    for stream in (False, True):
        if stream:
            (choice,), _ = streamed(client, **forced, messages=messages)
        else:
            (choice,) = client.chat.completions.create(**forced, messages=messages).choices
        (call,) = choice.message.tool_calls
        messages.append(choice.message)
        messages.append({"role": "tool", "tool_call_id": call.id, "content": "3"})
    last = client.chat.completions.create(**fields, messages=messages, tool_choice="none", max_tokens=5)
    assert last.choices[0].message.tool_calls is None
    assert last.choices[0].message.content


def function(parameters, **fields) -> dict:
    return {"type": "function", "function": {"name": "f", "parameters": parameters} | fields}


WRONG = {
    "a choice without tools": ({"tools": None, "tool_choice": "required"}, "tool_choice", "only with tools"),
    "another function": (
        {"tool_choice": {"type": "function", "function": {"name": "g"}}},
        "tool_choice",
        "'g' is not among the tools",
    ),
    "an unknown choice": ({"tool_choice": "any"}, None, "tool_choice"),
    "a custom tool": ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, None, "tools"),
    "an unsupported schema": (
        {"tools": [STOP, function({"properties": {"a": {"not": {}}}})], "tool_choice": "required"},
        "tools.1.function.parameters",
        'Unimplemented keys: ["not"]',
    ),
    "an unsupported strict schema": (
        {"tools": [STOP, function({"properties": {"a": {"type": "objekt"}}}, strict=True)]},
        "tools.1.function.parameters",
        "Invalid type: objekt",
    ),
    "arguments that are no object": (
        {"tools": [function({"type": "string"})], "tool_choice": "required"},
        "tools.0.function.parameters",
        "the type is 'string', and arguments are an object",
    ),
    "a file": (
        {"tools": [function({"$ref": "file:///etc/passwd"})], "tool_choice": "required"},
        "tools.0.function.parameters",
        "does not fetch resources",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_tools_are_refused_by_name(client, name):
    fields, param, message = WRONG[name]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as raised:
            client.chat.completions.create(**FIELDS | fields, stream=stream)
        assert message in raised.value.body["message"]
        assert raised.value.body["type"] == "invalid_request_error"
        assert param in (None, raised.value.body["param"])


@pytest.mark.parametrize("form", FORMS)
def test_a_choice_among_some_of_the_tools(form_client):
    allowed = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "s"}}]},
    }
    fields = FIELDS | {"tool_choice": allowed, "parallel_tool_calls": False, "n": 2, "seed": 1}
    answer = form_client.chat.completions.create(**fields)
    assert [call.function.name for one in answer.choices for call in one.message.tool_calls] == ["s", "s"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["qwen", "llama"])
def test_a_response_format_beside_tools(clients, form):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    answer_format = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    answer = clients[form].chat.completions.create(**FIELDS, n=4, seed=1, response_format=answer_format)
    for one in answer.choices:
        if one.finish_reason == "stop":
            assert json.loads(one.message.content)["a"] in (1, 2)
        else:
            assert one.message.tool_calls or one.finish_reason == "length"
