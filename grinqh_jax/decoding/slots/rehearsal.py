"""Calls every program that jobs run on no tokens: to find the programs, or to compile them in advance."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import jax
import numpy as np

from grinqh_jax.decoding.engine.prompt import PREVIEW_TOKENS
from grinqh_jax.decoding.prefill_buckets import PrefillBucket, bucket_widths
from grinqh_jax.decoding.programs import Lowering, Programs
from grinqh_jax.decoding.slots.device import Device
from grinqh_jax.decoding.slots.settings import Settings
from grinqh_jax.decoding.slots.step_shapes import StepShape

CHUNKS = (False, False), (True, False), (False, True)
"""Arguments ``greedy`` and ``logprobs`` of all kinds of decode chunks."""


def compile_all(device: Device, programs: Programs, settings: Settings) -> None:
    """Compiles all programs of a device, several at once, and runs them on no tokens.

    Args:
      device: Device of which no slot is in use.
      programs: Programs of the model that are compiled.
      settings: Settings of a request for one token; those of all requests have the same structure.
    """
    widths = bucket_widths(max(device.shape.prefill_chunk, PREVIEW_TOKENS))
    programs.compile(lowerings(device, widths, settings, CHUNKS, (False, True)))
    for _ in range(2):  # The second time all inputs are outputs of the programs.
        _rehearse(device, widths, settings, CHUNKS, (False, True))
    device.wait()


def lowerings(
    device: Device,
    widths: Iterable[int],
    settings: Settings,
    chunks: Iterable[tuple[bool, bool]],
    logprobs: Iterable[bool] = (False,),
) -> dict[Hashable, Lowering]:
    """Returns the lowerings of the programs that jobs run.

    Args:
      device: The device. It may be abstract.
      widths: Widths of the buckets of the jobs' prompts.
      settings: Settings of one of the jobs.
      chunks: Arguments ``greedy`` and ``logprobs`` of their decode chunks.
      logprobs: Arguments ``logprobs`` of ``Device.insert``.
    """
    recorder = _Recorder(device)
    _rehearse(recorder, widths, settings, chunks, logprobs)
    return recorder.lowerings


class _Recorder(Device):
    """A device that notes how its programs are lowered, and runs none.

    Attributes:
      lowerings: Lowering of each program.
    """

    def __init__(self, device: Device):
        vars(self).update(vars(device))
        self._placement = dataclasses.replace(device._placement, abstract=True)
        self._state = self._placement.structs(device._state)
        self.lowerings: dict[Hashable, Lowering] = {}

    def _run(self, name: str, program: Any, *arguments: Any, result: Callable[[], Any], **static: Any) -> Any:
        model: tuple[Any, ...] = ()
        if isinstance(program, functools.partial):
            program, model = program.func, program.args
        arguments = self._placement.structs(arguments)
        leaves, structure = jax.tree.flatten(arguments)
        sizes = tuple((leaf.shape, leaf.dtype.name) for leaf in leaves)
        lowering = functools.partial(program.lower, *model, *arguments, **static)
        self.lowerings[name, structure, sizes, *static.items()] = lowering
        return result()


def _rehearse(
    device: Device,
    widths: Iterable[int],
    settings: Settings,
    chunks: Iterable[tuple[bool, bool]],
    logprobs: Iterable[bool],
) -> None:
    """Calls the programs (arguments: see ``lowerings``)."""
    shape, chunks, prefix = device.shape, list(chunks), device.prefix([], 0)
    sizes = [(width, pages * shape.page_size) for width in widths for pages in shape.prefill_pages(width)]
    for width, end in sizes:
        bucket = PrefillBucket(np.zeros((1, width), np.int32), np.zeros(1, np.int32), end)
        prefix = device.prefix([], 0)
        for _ in range(2):  # A prefix without tokens, and one that a prefill returned.
            if shape.prompt_logprobs:
                device.prompt_logprobs(prefix, bucket, bucket.tokens)
            prefix = device.prefill(prefix, bucket, settings)
    for wanted in logprobs:
        device.insert(0, prefix, [], settings, wanted)
    every, speculates = device.step_shapes[0], device.speculation is not None

    def decode(step: StepShape, level: int | None, greedy: bool, wanted: bool, masks: Any = None) -> None:
        rows = list(range(step.texts))
        if speculates:
            device.speculate(rows, [0] * step.texts, step.drafts, greedy, wanted, masks)
        else:
            device.generate(rows, greedy, wanted, masks, level)

    for level, (greedy, wanted) in itertools.product(device.levels, chunks):
        for step in device.step_shapes:
            if step.texts == shape.slots or not wanted:
                decode(step, level, greedy, wanted)
    for level in device.levels if shape.grammars else ():
        decode(every, level, False, True, device.masks({}))
    if device.graded and not shape.contiguous:
        device.turn(0, 0.0)
    device.free(0)
