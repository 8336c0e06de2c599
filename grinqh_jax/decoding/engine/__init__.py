"""The functional core: prefill and decoding as pure functions on pytrees.

A serving stack can call these functions directly. The settings of a request (bits, sampling parameters, stop
tokens, limits) are arrays. Only shapes, ``steps``, the ``DecodePolicy``, ``Sampling.greedy`` and the presence
of penalties are static, so a changed request compiles nothing. Caches are donated: use the returned one.

``prompt`` reads prompts at full precision (prefill), ``step`` reads one or a few graded tokens of every row,
and ``chunk`` is the decode loop on the device.
"""

from grinqh_jax.decoding.engine.chunk import Chunk, decode_chunk
from grinqh_jax.decoding.engine.prompt import Preview, merge_previews, prefill, prefill_with_preview
from grinqh_jax.decoding.engine.step import decode_step

__all__ = [
    "Chunk",
    "Preview",
    "decode_chunk",
    "decode_step",
    "merge_previews",
    "prefill",
    "prefill_with_preview",
]
