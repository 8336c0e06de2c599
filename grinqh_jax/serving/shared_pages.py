"""Storage of texts in pages, which texts with the same leading tokens share."""

from collections.abc import Iterator, Sequence

from grinqh_jax.decoding.batching.job import Job
from grinqh_jax.decoding.model_files import prompt_too_long
from grinqh_jax.decoding.prefill_buckets import PrefillBucket, cut_chunks, shareable
from grinqh_jax.decoding.slots.shape import Shape
from grinqh_jax.errors import UsageError
from grinqh_jax.serving.pages import PageAllocator


class SharedPages:
    """The ``Storage`` of an engine for many requests.

    Attributes:
      allocator: Pages of the cache.
    """

    def __init__(self, shape: Shape, graded: bool):
        """Makes a storage of free pages.

        Args:
          shape: Sizes of the engine.
          graded: Whether the model is graded, so that prompts have a preview.
        """
        self.allocator = PageAllocator(shape.num_pages, shape.page_size)
        self._shape = shape
        self._graded = graded

    def check(self, prompt: int, answer: int) -> None:
        """Raises UsageError if a prompt and an answer of these lengths can never fit."""
        shape = self._shape
        if prompt < 1:
            raise UsageError("a prompt has no tokens; give at least one")
        if prompt >= shape.max_context:
            raise prompt_too_long(prompt, shape.max_context)
        pages = self.allocator.pages_for(prompt + answer)
        if pages > shape.num_pages:
            raise UsageError(
                f"{prompt} prompt tokens and an answer of {answer} take {pages} cache pages of "
                f"{shape.page_size} tokens, and the cache has {shape.num_pages}; shorten the request or "
                "raise the cache memory"
            )

    def reserve(self, job: Job) -> int | None:
        """Takes all pages of a job; returns the number of shared tokens, or None if pages are missing."""
        unit = self._shape.prefill_chunk // self._shape.page_size
        shareable = 0 if job.prompt_logprobs else self._shareable(job.prompt)
        shared = self.allocator.share(job.prompt[:shareable], unit)
        total = self.allocator.pages_for(len(job.prompt) + job.limit)
        own = self.allocator.allocate(total - len(shared))
        if own is None:
            self.allocator.release(shared)
            return None
        job.pages = shared + own
        return len(shared) * self._shape.page_size

    def cut(self, job: Job, start: int) -> Iterator[PrefillBucket]:
        """Yields buckets that end at positions which depend on the prompt alone."""
        return cut_chunks(job.prompt, start, self._shape.prefill_chunk, self._graded)

    def keep(self, job: Job, end: int) -> None:
        """Shares the whole prefill chunks that are read."""
        self.allocator.register(job.prompt[: min(end, self._shareable(job.prompt))], job.pages)

    def release(self, job: Job) -> None:
        """Removes a user from each page of a job."""
        self.allocator.release(job.pages)

    def _shareable(self, prompt: Sequence[int]) -> int:
        """Returns the number of leading tokens that may come from shared pages."""
        return 0 if self._shape.rings else shareable(len(prompt), self._shape.prefill_chunk, self._graded)
