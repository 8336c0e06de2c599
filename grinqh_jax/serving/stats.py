"""Numbers of requests, pages and tokens of an engine."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Load of an engine at the moment.

    Attributes:
      waiting: Number of requests that wait for a slot or for pages.
      reading: Number of requests whose prompts are being read.
      decoding: Number of requests whose answers are being decoded.
      slots: Number of requests that can be read or decoded at once.
      pages: Number of pages of the cache.
      pages_in_use: Number of pages that requests use.
      pages_kept: Number of unused pages that hold prefixes for later requests.
      pages_evicted: Number of prefix pages that other texts have taken so far.
      prompt_tokens: Number of prompt tokens of all requests that left the queue so far.
      reused_tokens: Number of these that came from shared pages.
    """

    waiting: int
    reading: int
    decoding: int
    slots: int
    pages: int
    pages_in_use: int
    pages_kept: int
    pages_evicted: int
    prompt_tokens: int
    reused_tokens: int
