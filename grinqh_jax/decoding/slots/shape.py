"""The sizes of an engine: of its state on the device, of its cache, and of its programs."""

import dataclasses

from grinqh_jax.errors import UsageError


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
        return -(-self.max_context // self.page_size)


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
