"""The bits of answers are turned while they run, by OpenAI's client over a socket."""

import uuid

import openai
import pytest

SETTINGS = {"max_tokens": 60, "temperature": 1.0}
UNENDED = {"ignore_eos": True}
SEED, CHOICES = 3, 12


@pytest.fixture
def stream(client):
    """Events of 12 answers at 1.5 bits in the two slots of the server."""
    options = {"include_usage": True}
    fields = {"n": CHOICES, "seed": SEED, "stream": True, "stream_options": options} | SETTINGS
    with client.completions.create(
        model="tiny@1.5", prompt="The cat", **fields, extra_body=UNENDED
    ) as stream:
        yield stream


def turn(client, id, body):
    return client.post(f"/answers/{id}/bits", body=body, cast_to=object)


def test_answers_read_other_bits_after_a_turn(client, server, stream):
    events = [next(stream)]
    id = events[0].id
    uuid.UUID(id.removeprefix("cmpl-"), version=4)  # nobody can guess it
    for bits, before in (("full", 1.5), (6, "full"), (6.0, 6)):
        answer = turn(client, id, {"bits": bits})
        assert answer == {"id": id, "object": "answer.bits", "bits": bits, "previous_bits": before}
    for bits in (0, -1, 8.5, 0.5, "half", None, [3]):
        with pytest.raises(openai.BadRequestError, match="bits") as refused:
            turn(client, id, {"bits": bits})
        if bits is not None:  # means the default in a request
            with pytest.raises(openai.BadRequestError) as expected:
                client.completions.create(model="tiny", prompt="a", extra_body={"bits": bits})
            assert refused.value.body == expected.value.body
    assert server.post(f"/v1/answers/{id}/bits", b'{"bits": NaN}')[0] == 400
    with pytest.raises(openai.BadRequestError, match="'n' is not a field"):
        turn(client, id, {"bits": 3, "n": 1})

    events += stream
    texts = [""] * CHOICES
    for event in events[:-1]:
        texts[event.choices[0].index] += event.choices[0].text
    low, high = (
        client.completions.create(
            model=f"tiny@{bits}", prompt="The cat", seed=SEED + CHOICES - 1, **SETTINGS, extra_body=UNENDED
        )
        for bits in (1.5, 6)
    )
    assert texts[-1] == high.choices[0].text != low.choices[0].text  # it had waited for a slot
    mean = events[-1].usage.realised_bits  # of all tokens, those before the turn included
    assert low.usage.realised_bits + 1 < mean < high.usage.realised_bits + 0.2

    with pytest.raises(openai.NotFoundError, match=r"no answer with the id 'cmpl-.*' runs") as ended:
        turn(client, id, {"bits": 3})
    assert (ended.value.code, ended.value.type) == ("answer_not_found", "invalid_request_error")


def test_an_unknown_answer_cannot_be_turned(client, server):
    name = r'grinqh_http_responses_total\{path="/v1/answers/\{id\}/bits",status="404"\}'
    before = server.metric(name)
    for id in ("cmpl-0", f"chatcmpl-{uuid.uuid4().hex}", "%2e%2e", "x" * 1000):
        with pytest.raises(openai.NotFoundError, match="no answer with the id"):
            turn(client, id, {"bits": 3})
    assert server.metric(name) == before + 4
    with pytest.raises(openai.APIStatusError, match="GET is not allowed") as wrong:
        client.get("/answers/cmpl-0/bits", cast_to=object)
    assert wrong.value.status_code == 405
    assert server.json("/v1/answers//bits", {"bits": 3})[0] == 404
