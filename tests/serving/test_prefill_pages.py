"""A prefill chunk attends to as many pages as its end needs: not to those of the longest text."""

import dataclasses
import random

import jax
import jax.numpy as jnp
import mesh_models
import numpy as np
import pytest
from engine_cases import SHORT
from family_cases import CASES
from flax import nnx

from grinqh_jax.decoding.batching.job import Job
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.decoding.request import Request
from grinqh_jax.decoding.slots import shape as shapes
from grinqh_jax.decoding.slots.device import Device
from grinqh_jax.decoding.slots.shape import Shape, contiguous_shape
from grinqh_jax.decoding.texts import Received
from grinqh_jax.serving.engine import Engine
from grinqh_jax.serving.shared_pages import SharedPages

SIZES = {"slots": 2, "max_context": 256, "page_size": 16, "prefill_chunk": 32}
FEW, ALL = 1 << 11, 1 << 30
"""Values of ``LEAST_SCORES``: 32 tokens then attend to 64, 128 or 256 positions; or always to all."""


def served(**sizes) -> Shape:
    defaults = {"slots": 16, "max_context": 8192, "page_size": 64, "prefill_chunk": 512, "num_pages": 2048}
    return Shape(**defaults | {"stop_tokens": 1} | sizes)


def test_the_numbers_of_pages_of_a_server():
    assert {width: served().prefill_pages(width) for width in (32, 64, 128, 256, 512)} == {
        32: [128],
        64: [64, 128],
        128: [32, 64, 128],
        256: [16, 32, 64, 128],
        512: [8, 16, 32, 64, 128],
    }
    assert served(max_context=832).prefill_pages(512) == [8, 13]
    assert served(page_size=2048, prefill_chunk=2048).prefill_pages(512) == [1, 2, 4]
    assert contiguous_shape(5000, slots=3).prefill_pages(2048) == [1]


@pytest.mark.parametrize("max_context", [300, 832, 8192, 40960])
def test_the_pages_hold_the_chunk_and_depend_on_its_end_alone(max_context):
    """The number of pages can change only where a page ends."""
    shape, longest = served(max_context=max_context), served(max_context=1 << 17)
    beside_edges = {edge + i for edge in range(0, max_context + 1, 64) for i in (-1, 0, 1)} | {max_context}
    ends = [end for end in beside_edges if 1 <= end <= max_context]
    for width in (32, 128, 512):
        read = {end: shape.pages_read(width, end) for end in ends}
        assert all(64 * pages >= end for end, pages in read.items())
        assert set(read.values()) == set(shape.prefill_pages(width))
        for end, pages in read.items():
            assert pages in (shape.pages_per_slot, longest.pages_read(width, end))


def read_prompts(monkeypatch, model, dial, settings, prompts, sizes) -> list:
    """Returns the numpy prefix of each prompt with the keys and values of its tokens, the log-probabilities
    of the tokens that were read, and how many pages each program has read."""
    shape = Shape(**sizes, num_pages=40, stop_tokens=1, prompt_logprobs=True)
    device, storage = Device(model, dial, shape, SHORT, settings), SharedPages(shape, dial is not None)
    results, run = [], device._run
    read: dict[str, set[int]] = {"prefill": set(), "prompt_logprobs": set()}

    def noted(name, *arguments, **rest):
        if name in read:
            read[name].add(rest["pages_read"])
        return run(name, *arguments, **rest)

    monkeypatch.setattr(device, "_run", noted)
    for prompt in prompts:
        job = Job(prompt, settings, Received())
        reused = storage.reserve(job)
        prefix, logprobs = device.prefix(job.pages, reused), []
        for bucket in storage.cut(job, reused):
            following = np.roll(bucket.tokens, -1, axis=1)
            scored = device.prompt_logprobs(prefix, bucket, following)
            logprobs.append(jax.tree.map(lambda rows: np.asarray(rows)[:, : bucket.lengths[0] - 1], scored))  # noqa: B023
            prefix = device.prefill(prefix, bucket, settings)
            storage.keep(job, bucket.end)
        rows = [
            np.asarray(array)[job.pages].reshape(-1, *array.shape[2:])[: len(prompt)]
            for array in (*device.cache.keys, *device.cache.values)
        ]
        prefix = jax.tree.map(np.asarray, dataclasses.replace(prefix, pages=None))
        results.append((reused, prefix, rows, logprobs))
        storage.release(job)
    return [*results, read]


@pytest.mark.slow
@pytest.mark.usefixtures("optimized_programs")
@pytest.mark.parametrize(
    ("family", "rings"),
    [
        ("llama-yarn", False),
        ("gemma3", False),
        ("gpt_oss", True),
        ("qwen3-moe-window", True),
        ("qwen3_5", True),
    ],
)
def test_a_prompt_is_read_as_with_the_longest_table(monkeypatch, generator, family, rings):
    """With windows in pages and in rings, and recurrent states; a whole text, and one after shared pages."""
    config = CASES[family] | {"vocab_size": 258, "max_position_embeddings": 512}
    model = mesh_models.model_of(config)
    nnx.update(model, jax.tree.map(jnp.asarray, nnx.state(model)))
    files = generator.tokenizer, generator.defaults, generator.targets, generator.directory
    talker = Generator(model, *files)
    dial, settings = talker.dial(3.0), talker.settings(Request(bits=3.0), 1)
    tokens = np.random.default_rng(0).integers(2, 256, 250).tolist()
    prompts = [tokens[:20], tokens[:150], tokens, tokens[:97]]
    results, sizes = [], SIZES | {"rings": rings}
    for least, pages in ((FEW, {4, 8, 16}), (ALL, {16})):
        monkeypatch.setattr(shapes, "LEAST_SCORES", least)
        results.append(read_prompts(monkeypatch, model, dial, settings, prompts, sizes))
        assert results[-1].pop() == {"prefill": pages, "prompt_logprobs": pages}
    assert [reused for reused, *_ in results[0]] == ([0] * 4 if rings else [0, 0, 64, 32])
    jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.slow
@pytest.mark.usefixtures("optimized_programs")
def test_answers_of_an_engine_with_several_tables(monkeypatch, generator, compilations):
    """They compile nothing, and equal those of the library, which reads whole rows. Some have
    log-probabilities of their prompts."""
    monkeypatch.setattr(shapes, "LEAST_SCORES", FEW)
    model = nnx.clone(generator.model)
    model.config = dataclasses.replace(model.config, max_position_embeddings=256)
    files = generator.tokenizer, generator.defaults, generator.targets, generator.directory
    long, rng = Generator(model, *files), random.Random(5)
    system = [rng.randrange(2, 258) for _ in range(200)]
    cases = []
    for _ in range(200):
        prompt = system[: rng.choice([0, 32, 64, 130, 200])]
        prompt += [rng.randrange(2, 258) for _ in range(rng.randrange(1, 40))]
        cases.append((prompt, Request(bits=rng.choice([2.5, 3.0, "full"]), max_tokens=rng.randrange(1, 7))))
    with Engine(long, **SIZES, policy=SHORT, prompt_logprobs=True) as engine:
        compilations.clear()
        scored = {"top_logprobs": 1, "prompt_logprobs": True}
        answers = [engine.submit(*case, **scored if i % 5 == 0 else {}) for i, case in enumerate(cases)]
        for answer in answers:
            answer.result(60)
        assert not compilations
    assert sum(answer.reused_tokens > 0 for answer in answers) > 50
    for (prompt, request), answer in list(zip(cases, answers, strict=True))[::8]:
        alone = long.generate(prompt, request, max_context=256)
        list(alone)
        assert answer.tokens == alone.tokens
    for (prompt, _), answer in list(zip(cases, answers, strict=True))[::5]:
        assert [token.token for token in answer.prompt_logprobs] == prompt[1:]
