"""Drafts of a model: the target at fewer bits, and another checkpoint."""

import dataclasses

import pytest
from test_speculation import PROMPTS, SHORT, assert_same, run

from grinqh_jax.decoding.generator import Generator
from grinqh_jax.decoding.load_speculation import model_drafter, speculation_of
from grinqh_jax.decoding.request import Request
from grinqh_jax.decoding.slots import shape as shapes
from grinqh_jax.decoding.speculation.setting import SpeculationSetting
from grinqh_jax.decoding.speculation.speculation import Speculation
from grinqh_jax.errors import UsageError
from grinqh_jax.serving.engine import Engine


@pytest.fixture
def held(generator, monkeypatch):
    monkeypatch.setattr(generator, "holds_dial", True)
    return generator


def test_settings_in_words():
    def parsed(text):
        setting = SpeculationSetting.parse(text)
        return setting and dataclasses.astuple(setting)

    assert parsed("off") is None
    assert parsed("lookup") == ("lookup", None, None)
    assert parsed("self") == ("self", None, 2.0)
    assert parsed("self@2.5") == ("self", None, 2.5)
    assert parsed("Qwen/Qwen3-0.6B@3") == ("model", "Qwen/Qwen3-0.6B", 3.0)
    assert parsed("a@b/c") == ("model", "a@b/c", None)
    assert parsed("model@full") == ("model", "model", "full")
    for wrong in ("", "@3", "lookup@2", "off@1"):
        with pytest.raises(UsageError, match="speculate"):
            SpeculationSetting.parse(wrong)


def test_what_cannot_draft_is_refused_by_name(generator, dense_directory):
    with pytest.raises(UsageError, match="bits 9: this checkpoint's dial goes from 1 to 8"):
        speculation_of(SpeculationSetting("self", bits=9.0), generator)
    dense = Generator.load(dense_directory)
    with pytest.raises(UsageError, match="is not quantized and has no fewer bits to draft with"):
        speculation_of(SpeculationSetting("self", bits=2.0), dense)
    assert speculation_of(None, generator) is None


def test_drafts_that_take_a_step_each_are_fewer(generator, graded_directory):
    most = [
        speculation_of(SpeculationSetting.parse(text), generator).most_drafts
        for text in ("lookup", "self", str(graded_directory))
    ]
    assert most == [7, 3, 3]


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_target_drafts_for_itself(held, temperature):
    options = {"bits": "full", "temperature": temperature}
    plain = run(held, **options)
    for bits, least in ((4.0, 0.0), ("full", 0.95)):
        speculation = speculation_of(SpeculationSetting("self", bits=bits), held)
        drafted = run(held, **options, speculation=dataclasses.replace(speculation, always=True))
        assert_same(drafted, plain)
        for row in drafted.rows:
            assert row.speculation.drafted > 20
            assert row.speculation.acceptance >= least


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_another_checkpoint_drafts(held, graded_directory, dense_directory, temperature):
    """The same checkpoint, loaded again, drafts what the target says; it has another cache."""
    options = {"bits": "full", "temperature": temperature}
    plain = run(held, **options)
    again = model_drafter(Generator.load(graded_directory), held, "full")
    unlike = model_drafter(Generator.load(dense_directory), held, None)
    for drafter, least in ((again, 0.9), (unlike, 0.05)):
        drafted = run(held, **options, speculation=Speculation(drafter, always=True))
        assert_same(drafted, plain)
        for row in drafted.rows:
            assert row.speculation.acceptance >= least


@pytest.mark.slow
def test_a_draft_model_catches_up_after_steps_without_drafts(held, graded_directory):
    drafter = model_drafter(Generator.load(graded_directory), held, "full")
    one = PROMPTS[:1]
    plain = run(held, one, bits="full", max_tokens=60)
    drafted = run(held, one, bits="full", max_tokens=60, speculation=Speculation(drafter))
    assert_same(drafted, plain)
    figures = drafted.rows[0].speculation
    assert figures.accepted > 0


@pytest.mark.slow
def test_an_engine_drafts_with_a_model_in_shared_pages(generator, graded_directory, monkeypatch):
    monkeypatch.setattr(shapes, "LEAST_SCORES", 1 << 10)  # Prefill chunks attend to 2, 4 or 8 pages.
    drafter = model_drafter(Generator.load(graded_directory), generator, "full")
    prompt = (list(b"the cat sat on the mat and the cat sat on the hat, said the cat to the bat. ") * 2)[:97]
    request = Request(bits="full", max_tokens=30, temperature=0.0, stop_tokens=())
    speculation = Speculation(drafter, always=True)
    sizes = {"slots": 2, "max_context": 128, "page_size": 16, "prefill_chunk": 16}
    with Engine(generator, **sizes, policy=SHORT, speculation=speculation) as engine:
        first = engine.generate_many([prompt], request)[0]
        second = engine.generate_many([prompt] * 2, request)
    alone = generator.generate(prompt, request)
    list(alone)
    for answer in (first, *second):
        assert answer.tokens == alone.tokens
        assert answer.speculation.acceptance > 0.9
    assert second[1].reused_tokens > 0
