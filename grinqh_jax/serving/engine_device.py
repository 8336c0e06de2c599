"""The device of an engine, which is the same in all processes that serve a model."""

import dataclasses
from typing import Any

import jax

from grinqh_jax.decoding.generator import Generator
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.request import Request
from grinqh_jax.decoding.slots.device import Device
from grinqh_jax.decoding.slots.rehearsal import compile_all
from grinqh_jax.decoding.slots.settings import Settings, sampling_rows
from grinqh_jax.decoding.slots.shape import Shape
from grinqh_jax.decoding.speculation.speculation import Speculation
from grinqh_jax.errors import UsageError
from grinqh_jax.serving.processes import agreed
from grinqh_jax.serving.sizes import engine_shape


def engine_device(
    generator: Generator, policy: DecodePolicy, speculation: Speculation | None, **sizes: Any
) -> Device:
    """Allocates the cache of an ``Engine`` and compiles its programs. All processes call it.

    Args:
      generator: Model, tokenizer and defaults.
      policy: How programs are compiled.
      speculation: How to speculate; None for not at all.
      sizes: Arguments of ``engine_shape``.

    Raises:
      UsageError: An argument is out of range, or the device has too little free memory.
    """
    shape = engine_shape(generator, **sizes)
    if jax.process_count() > 1:
        shape = dataclasses.replace(shape, num_pages=agreed(shape.num_pages))
    settings = request_settings(generator, shape, Request(), 1)
    dial = generator.dial(None)
    device = Device(generator.model, dial, shape, policy, settings, speculation=speculation)
    compile_all(device, generator.programs, settings)
    return device


def request_settings(generator: Generator, shape: Shape, request: Request, limit: int) -> Settings:
    """Returns the settings of a request, with the structure and the shapes that all requests share."""
    stop_tokens, most = generator.stop_tokens(request), shape.stop_tokens
    if len(stop_tokens) > most:
        raise UsageError(f"the request has {len(stop_tokens)} stop tokens; at most {most} are supported")
    sampling = sampling_rows(
        1, generator.model.config.vocab_size, seed=request.seed, **generator.sampling(request)
    )
    return Settings.of_request(sampling, generator.bits(request.bits), stop_tokens, limit, most)
