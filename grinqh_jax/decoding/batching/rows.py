"""Storage of texts that share nothing: each slot has one page."""

from collections.abc import Iterator

from grinqh_jax.decoding.batching.job import Job
from grinqh_jax.decoding.prefill_buckets import PrefillBucket, cut


class Rows:
    """A ``Storage`` in which slot b has page b. Nothing is reused."""

    def reserve(self, job: Job) -> int:
        """Gives the page of the slot to the job; always fits, and returns 0."""
        assert job.slot is not None, "an admitted job has a slot"
        job.pages = [job.slot]
        return 0

    def cut(self, job: Job, start: int) -> Iterator[PrefillBucket]:
        """Yields the largest buckets."""
        return cut([job.prompt], start)

    def keep(self, job: Job, end: int) -> None:
        """Keeps nothing."""

    def release(self, job: Job) -> None:
        """Does nothing: the next job of the slot overwrites the page."""
