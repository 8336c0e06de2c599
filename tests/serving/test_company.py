"""Answers, with programs compiled as outside tests: the same alone and in company."""

import jax
import jax.numpy as jnp
import mesh_models
import numpy as np
import pytest
from family_cases import CASES
from flax import nnx

from grinqh_jax.bundled import BUNDLED_MODEL
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.request import Request
from grinqh_jax.decoding.slots.step_shapes import rows_are_independent
from grinqh_jax.model.config import ModelConfig
from grinqh_jax.serving.engine import Engine
from pallas_kernels.lanes import device

WORDS = ["cat", "dog", "ship", "tree", "king", "bird", "house", "boy"]


def assert_same_alone_and_in_company(monkeypatch):
    """Answers begin and end one after another, so chunks of all numbers of rows decode parts of them."""
    generator = Generator.load(BUNDLED_MODEL)
    prompts = [f"Once upon a time there was a {size} {word}" for size in ("big", "small") for word in WORDS]
    bits = [2.0, 3.0, 4.0, "full", 2.5, 3.0, 3.5, 3.0] * 2
    requests = [
        Request(bits=each, max_tokens=100 + 9 * i, temperature=0.0, stop_tokens=())
        for i, each in enumerate(bits)
    ]
    rows: set[int] = set()
    with Engine(generator, slots=16, max_context=300, prefill_chunk=64) as engine:
        slots_device = engine.scheduler._device
        generate = slots_device.generate
        monkeypatch.setattr(
            slots_device, "generate", lambda slots, *rest: (rows.add(len(slots)), generate(slots, *rest))[1]
        )
        together = engine.generate_many(prompts, requests)
        assert rows == {1, 2, 4, 8, 16}
        # Chunks of 8 texts and more have half as many steps.
        steps = DecodePolicy.for_engine().chunk_steps
        assert {steps // 2, steps} <= {len(piece.tokens) for answer in together for piece in answer}
        rows.clear()
        alone = [engine.generate_many([p], r)[0] for p, r in zip(prompts, requests, strict=True)]
        assert rows == {1}
    for one, other in zip(together, alone, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_array_equal(one.grading_stats.packed, other.grading_stats.packed)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("optimized_programs")
def test_an_answer_of_the_bundled_model_is_the_same_alone_and_in_company(monkeypatch):
    assert_same_alone_and_in_company(monkeypatch)


@pytest.mark.slow
@pytest.mark.usefixtures("optimized_programs")
def test_an_answer_of_a_mixture_is_the_same_alone_and_in_company(generator):
    """XLA routes one row otherwise than two, so the engine always decodes all slots."""
    config = CASES["qwen3-moe"] | {"vocab_size": 258, "hidden_size": 256, "num_experts": 32}
    model = mesh_models.model_of(config)
    nnx.update(model, jax.tree.map(jnp.asarray, nnx.state(model)))
    files = generator.tokenizer, generator.defaults, generator.targets, generator.directory
    prompts = [np.random.default_rng(i).integers(2, 256, 5 + i).tolist() for i in range(2)]
    requests = [Request(bits=4.0, max_tokens=20 + 8 * i, temperature=0.0, stop_tokens=()) for i in range(2)]
    with Engine(Generator(model, *files), slots=2, max_context=128, page_size=16, prefill_chunk=32) as engine:
        together = engine.generate_many(prompts, requests)
        alone = [engine.generate_many([p], r)[0] for p, r in zip(prompts, requests, strict=True)]
    for one, other in zip(together, alone, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_array_equal(one.grading_stats.packed, other.grading_stats.packed)


@pytest.mark.skipif(jax.__version_info__ < device.OLDEST_JAX, reason="abstract devices need jax >= 0.11.2")
def test_only_models_whose_rows_are_independent_decode_some_of_the_slots():
    h200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (jax.sharding.AxisType.Auto,), abstract_device=h200)
    configs = {
        name: ModelConfig.from_hf(CASES[name]) for name in ("llama-yarn", "qwen3-moe", "qwen2-moe", "qwen3_5")
    }
    on_cpu = {name: rows_are_independent(config) for name, config in configs.items()}
    with jax.sharding.use_abstract_mesh(mesh):
        on_gpu = {name: rows_are_independent(config) for name, config in configs.items()}
    assert on_cpu == {"llama-yarn": True, "qwen3-moe": False, "qwen2-moe": False, "qwen3_5": False}
    assert on_gpu == on_cpu | {"qwen3-moe": True}


@pytest.mark.gpu
def test_an_answer_on_a_gpu_is_the_same_alone_and_in_company(monkeypatch):
    assert_same_alone_and_in_company(monkeypatch)
