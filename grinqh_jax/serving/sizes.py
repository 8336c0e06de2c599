"""The sizes of an engine: how many requests, tokens and pages it has room for."""

from grinqh_jax.decoding.generator import Generator
from grinqh_jax.decoding.model_files import check_context
from grinqh_jax.decoding.paged_cache import count_pages
from grinqh_jax.decoding.slots.shape import Shape
from grinqh_jax.errors import UsageError
from grinqh_jax.memory import free_memory

MOST_SLOTS = 64
"""Largest number of requests that are decoded together. Up to ``reading.MAX_GRADED_ROWS`` are graded."""

PAGE_SIZE = 64
"""Default number of positions of a page."""

MOST_STOP_TOKENS = 16
"""Least number of stop tokens that a request may have; more if the model has more."""

PREFILL_CHUNK = 512
"""Default number of prompt tokens read between two decode chunks."""


def engine_shape(
    generator: Generator,
    *,
    slots: int,
    max_context: int | None,
    cache_memory: int | None,
    page_size: int,
    prefill_chunk: int,
    prompt_logprobs: bool,
    share_prefixes: bool,
    grammars: bool,
) -> Shape:
    """Returns the sizes of an engine (arguments: see ``Engine``).

    Raises:
      UsageError: An argument is out of range, or the device has too little free memory.
    """
    if not 1 <= slots <= MOST_SLOTS:
        raise UsageError(
            f"slots {slots}: 1 to {MOST_SLOTS} requests are decoded together; choose such a number"
        )
    if page_size < 1 or prefill_chunk < 1:
        raise UsageError(
            f"pages of {page_size} tokens and prefill chunks of {prefill_chunk}: choose at least 1 for both"
        )
    model, context = generator.model, check_context(max_context, generator.model.config)
    share_prefixes &= not model.config.is_recurrent
    num_pages = count_pages(
        model.part_config,
        model.compute_dtype,
        slots=slots,
        max_context=context,
        page_size=page_size,
        cache_memory=cache_memory,
        free=free_memory(),
        share_prefixes=share_prefixes,
    )
    return Shape(
        slots=slots,
        max_context=context,
        page_size=page_size,
        prefill_chunk=prefill_chunk,
        num_pages=num_pages,
        stop_tokens=max(len(generator.defaults.eos_tokens), MOST_STOP_TOKENS),
        prompt_logprobs=prompt_logprobs,
        rings=not share_prefixes,
        grammars=grammars,
    )
