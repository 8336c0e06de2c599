"""The sizes of an engine: of its state on the device, of its cache, and of its programs."""

import dataclasses

from grinqh_jax.errors import UsageError

LEAST_SCORES = 1 << 18
"""Least product of the tokens of a prefill chunk and the positions in its program, if texts may be so long. A
smaller one would give more programs, and each would save less than a millisecond: on an H200 the attention of
512 tokens in a cache of 512 positions takes 28 us, as does that of 64 tokens in a cache of 4,096: 1.0 ms in
the 36 layers of Qwen3-8B."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the engine's programs and of its cache.

    Attributes:
      slots: Number of requests that are decoded at once.
      max_context: Most tokens of a prompt and its answer together.
      page_size: Number of positions of a page.
      prefill_chunk: Number of prompt tokens read in one call, a multiple of ``page_size``.
      num_pages: Number of pages of the cache.
      stop_tokens: Most stop tokens of a request.
      prompt_logprobs: Whether requests may have log-probabilities of their prompts.
      grammars: Whether requests may have grammars.
      contiguous: Whether slot b has page b and no other, so that texts share nothing.
      rings: Whether layers with windows keep rings in place of the whole context (``fixed_states``). No text
        can then start from a prefix of another one.

    Raises:
      UsageError: ``prefill_chunk`` is not a multiple of ``page_size``.
    """

    slots: int
    max_context: int
    page_size: int
    prefill_chunk: int
    num_pages: int
    stop_tokens: int
    prompt_logprobs: bool = False
    grammars: bool = False
    contiguous: bool = False
    rings: bool = False

    def __post_init__(self):
        if self.prefill_chunk % self.page_size:
            raise UsageError(
                f"a prefill chunk of {self.prefill_chunk} tokens is not a multiple of the page size "
                f"{self.page_size}; choose such a multiple"
            )

    @property
    def ring_context(self) -> int | None:
        """Largest number of tokens of a text, if layers with windows keep rings (see ``fixed_states``)."""
        return self.max_context if self.rings else None

    @property
    def pages_per_slot(self) -> int:
        """Number of pages of a text of ``max_context`` tokens."""
        return self._pages_for(self.max_context)

    def prefill_pages(self, width: int) -> list[int]:
        """Returns the numbers of pages, ascending, that prefill chunks of a width may attend to.

        Each has a program. The next one has twice as many positions, and the last one those of a whole text.
        """
        positions, pages = max(width, LEAST_SCORES // width), {self.pages_per_slot}
        while positions < self.max_context:
            pages.add(self._pages_for(positions))
            positions *= 2
        return sorted(pages)

    def pages_read(self, width: int, end: int) -> int:
        """Returns the number of leading pages of a text that a prefill chunk attends to.

        For each prompt it is always the same, because attention to more pages may round differently.

        Args:
          width: Width of the chunk, with padding.
          end: Position after its last token.
        """
        return next(pages for pages in self.prefill_pages(width) if pages * self.page_size >= end)

    def _pages_for(self, positions: int) -> int:
        return -(-positions // self.page_size)


def contiguous_shape(capacity: int, slots: int = 1, rings: bool = False) -> Shape:
    """Returns the sizes of a state whose slots have ``capacity`` positions (``rings``: see ``Shape``)."""
    return Shape(
        slots=slots,
        max_context=capacity,
        page_size=capacity,
        prefill_chunk=capacity,
        num_pages=slots,
        stop_tokens=0,
        contiguous=True,
        rings=rings,
    )
