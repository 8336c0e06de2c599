"""The decode loop on the host, with a device whose next token depends on all tokens in a text's pages."""

import dataclasses
import random
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from grinqh_jax.decoding import policy
from grinqh_jax.decoding.batching.job import Job
from grinqh_jax.decoding.batching.scheduler import Scheduler
from grinqh_jax.decoding.engine import Chunk
from grinqh_jax.decoding.slots.device import Device
from grinqh_jax.decoding.slots.settings import Settings, sampling_rows
from grinqh_jax.decoding.slots.shape import Shape
from grinqh_jax.decoding.slots.step_shapes import row_counts, step_shapes
from grinqh_jax.serving.shared_pages import SharedPages

SHAPE = Shape(
    slots=3, max_context=48, page_size=4, prefill_chunk=8, num_pages=16, stop_tokens=1, grammars=True
)
VOCABULARY = 64
STOP = 9


def in_chunks_of(steps: int, ahead: int) -> policy.DecodePolicy:
    return dataclasses.replace(policy.CPU, chunks_ahead=ahead, chunk_steps=steps)


def next_token(text: list[int]) -> int:
    return hash(tuple(text)) % VOCABULARY


def answer_to(prompt: list[int], limit: int) -> list[int]:
    answer: list[int] = []
    while len(answer) < limit and STOP not in answer:
        answer.append(next_token(prompt + answer))
    return answer


@dataclasses.dataclass
class Prefix:
    pages: list[int]
    length: int


@dataclasses.dataclass
class Slot:
    pages: list[int]
    length: int  # tokens in the pages: all but the last
    last: int
    left: int

    @property
    def done(self) -> bool:
        return self.left <= 0 or self.last == STOP


class PagedDevice(Device):
    """Does what a ``Device`` does, at once, with tokens in place of keys and values."""

    def __init__(self, steps: int, shape: Shape = SHAPE):
        self.shape, self.speculation, self.chunk_steps, self.on_mesh = shape, None, steps, False
        self.step_shapes = step_shapes(row_counts(shape.slots, fixed=False), 0, contiguous=False)
        self.decoded: list[int] = []  # numbers of rows of the chunks
        self.events: list[str | int] = []  # chunks, and the ends of the prefill chunks that were read
        self.pages = [[-1] * shape.page_size for _ in range(shape.num_pages)]
        self.slots: dict[int, Slot] = {}

    def read(self, pages: list[int], length: int) -> list[int]:
        size = self.shape.page_size
        return [self.pages[pages[i // size]][i % size] for i in range(length)]

    def write(self, pages: list[int], position: int, token: int) -> None:
        size = self.shape.page_size
        self.pages[pages[position // size]][position % size] = token

    def prefix(self, pages, length, fixed=None) -> Prefix:
        return Prefix(list(pages), length)

    def prefill(self, prefix, bucket, settings) -> Prefix:
        self.events.append(bucket.end)
        for token in bucket.tokens[0, : bucket.lengths[0]].tolist():
            self.write(prefix.pages, prefix.length, token)
            prefix = Prefix(prefix.pages, prefix.length + 1)
        return prefix

    def insert(self, slot, prefix, prompt, settings, logprobs, allowed=None) -> Chunk:
        assert slot not in self.slots, "the slot has another text"
        first = next_token(self.read(prefix.pages, prefix.length))
        self.slots[slot] = Slot(prefix.pages, prefix.length, first, int(settings.limits[0]) - 1)
        return self.chunk([[first]], [self.slots[slot].done])

    def steps(self, shape) -> int:
        return self.chunk_steps

    def generate(self, slots, greedy, logprobs, allowed=None, level=None) -> Chunk:
        assert (len(slots), 0) in self.step_shapes
        assert len(set(slots)) == len(slots)
        assert {slot for slot, text in self.slots.items() if not text.done} <= set(slots)
        self.decoded.append(len(slots))
        self.events.append("chunk")
        rows: list[list[int]] = []
        for slot in slots:
            row, text = [], self.slots.get(slot)
            while (
                text is not None and not text.done and len(row) < (self.chunk_steps if allowed is None else 1)
            ):
                self.write(text.pages, text.length, text.last)
                text.length, text.left = text.length + 1, text.left - 1
                text.last = next_token(self.read(text.pages, text.length))
                row.append(text.last)
            rows.append(row)
        return self.chunk(rows, [s not in self.slots or self.slots[s].done for s in slots])

    def chunk(self, rows: list[list[int]], done: list[bool]) -> Chunk:
        tokens = np.zeros((len(rows), max(map(len, rows), default=0)), np.int32)
        for row, new in zip(tokens, rows, strict=True):
            row[: len(new)] = new
        counts = jnp.array([len(row) for row in rows], jnp.int32)
        return Chunk(jnp.asarray(tokens), counts, counts, jnp.array(done), None)

    def level(self, bits) -> None:
        assert all(each > 0 for each in bits)

    def masks(self, allowed) -> Any:
        return allowed

    def turn(self, slot, bits) -> None:
        assert slot in self.slots

    def free(self, slot) -> None:
        del self.slots[slot]


class Grammar:
    def __init__(self, rng: random.Random):
        self.rng, self.tokens = rng, list[int]()

    def allowed(self):
        if self.rng.random() < 0.05:
            raise ValueError("no token fits")
        return np.zeros(2, np.uint32)

    def push(self, token: int) -> bool:
        self.tokens.append(token)
        return self.rng.random() < 0.05


class Receiver:
    """Notes the tokens and the end, which comes once. Now and then a method raises."""

    def __init__(self, rng: random.Random, fails: float):
        self.rng, self.fails = rng, fails
        self.tokens: list[int] = []
        self.ends: list[Any] = []
        self.begun = False

    def begin(self, reused_tokens):
        assert not self.begun
        self.begun = True

    def receive_prompt(self, logprobs): ...

    def receive_speculation(self, figures): ...

    def receive(self, tokens, stats, logprobs, seconds) -> bool:
        assert self.begun
        assert not self.ends
        self.tokens += tokens
        if self.rng.random() < self.fails:
            raise ValueError("the text cannot be decoded")
        return STOP in tokens

    def end(self, reason):
        assert not self.ends
        if self.rng.random() < self.fails:
            raise ValueError("the text cannot be decoded")
        self.ends.append(reason)

    def fail(self, error):
        assert not self.ends
        self.ends.append(error)


def random_job(rng: random.Random) -> Job:
    prompt = [1] * rng.choice([0, 0, 8, 17, 24]) + [
        rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 12))
    ]
    sampling: Any = sampling_rows(1, VOCABULARY)
    settings = Settings.of_request(sampling, 3.0, [STOP], rng.randint(1, 12), 1)
    grammar = Grammar(rng) if rng.random() < 0.15 else None
    answer = Receiver(rng, rng.choice([0.0, 0.0, 0.1]))
    return Job(prompt, settings, answer, priority=rng.choice([0, 0, 1]), grammar=grammar)


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("seed", range(8))
def test_no_slot_or_page_is_lost_and_no_text_changes_another(ahead, seed):
    """Requests come, are cancelled and turned between any two actions of the loop."""
    rng = random.Random(seed)
    steps = rng.choice([1, 3])
    device: Any = PagedDevice(steps)
    storage = SharedPages(SHAPE, graded=rng.random() < 0.5)
    loop = Scheduler(device, storage, in_chunks_of(steps, ahead))
    jobs: list[Job] = []

    def disturb() -> None:
        while rng.random() < 0.4 and len(jobs) < 60:
            jobs.append(random_job(rng))
            loop.add(jobs[-1])
        if jobs and rng.random() < 0.15:
            loop.cancel(rng.choice(jobs[-6:]))
        if jobs and rng.random() < 0.1:
            loop.turn(rng.choice(jobs[-6:]), rng.choice([2.0, 4.0]))

    rounds = 0
    while len(jobs) < 60 or not loop.idle:
        assert (rounds := rounds + 1) < 5000, "a request never ends"
        disturb()
        loop.dispatch()
        disturb()
        while loop.deliver():
            disturb()
    loop.close()
    assert storage.allocator.in_use == 0
    assert sorted(loop._free_slots) == list(range(SHAPE.slots))
    assert device.slots == {}
    for job in jobs:
        answer: Any = job.answer
        (end,) = answer.ends
        expected = answer_to(list(job.prompt), job.limit)
        assert answer.tokens == expected[: len(answer.tokens)]
        if end == "length" or (end == "stop" and job.grammar is None):
            assert answer.tokens == expected
            assert end == ("stop" if STOP in expected else "length")
        if job.grammar is not None:
            assert job.grammar.tokens == answer.tokens[: len(job.grammar.tokens)]


@pytest.mark.parametrize(("ahead", "rows"), [(0, [2, 3, 3, 1]), (1, [1, 2, 3, 2, 1])])
def test_a_chunk_decodes_the_answers_that_go_on_and_no_more_rows_than_the_next_program_has(ahead, rows):
    """Answers end at their limits, which the host knows before their last tokens arrive."""
    device: Any = PagedDevice(steps=4)
    loop = Scheduler(device, SharedPages(SHAPE, graded=True), in_chunks_of(4, ahead))
    for prompt in ([1], [2], [3]):
        sampling: Any = sampling_rows(1, VOCABULARY)
        settings = Settings.of_request(sampling, 3.0, [], 13, 1)
        loop.add(Job(prompt, settings, Receiver(random.Random(0), 0)))
    while not loop.idle:
        loop.step()
    loop.close()
    # A round reads one prompt, and each answer takes three chunks. Without a chunk ahead, the first answer
    # waits for its first token, which comes with the second prompt.
    assert device.decoded == rows


@pytest.mark.parametrize(
    ("prompt", "rounds"),
    [
        (512, [512]),  # The preview of the last 64 tokens is read with the rest of the chunk,
        (1024, [512, 1024]),
        (1100, [512, 1024, 1100]),
        (1000, [512, 1000]),
        (600, [512, 600]),
        (575, [511, 575]),  # but not if both have more tokens than a chunk.
        (576, [512, 576]),
        (2090, [512, 1024, 1536, 2048, 2090]),  # The preview may come before the end.
    ],
)
def test_a_round_reads_one_prefill_chunk_and_a_prompt_takes_no_more_rounds_than_it_needs(prompt, rounds):
    """The prefill chunks that are read between two chunks of another answer."""
    shape = dataclasses.replace(SHAPE, max_context=4096, page_size=64, prefill_chunk=512, num_pages=128)
    device: Any = PagedDevice(steps=1, shape=shape)
    loop = Scheduler(device, SharedPages(shape, graded=True), in_chunks_of(1, 1))
    sampling: Any = sampling_rows(1, VOCABULARY)

    def add(tokens: int, limit: int) -> None:
        settings = Settings.of_request(sampling, 3.0, [], limit, 1)
        loop.add(Job([1] * tokens, settings, Receiver(random.Random(0), 0)))

    add(1, 20)
    loop.step()
    device.events.clear()
    add(prompt, 1)
    while not loop.idle:
        loop.step()
    loop.close()
    between = " ".join(map(str, device.events)).split("chunk")
    read = [[int(end) for end in ends.split()] for ends in between]
    assert [ends for ends in read if ends] == [[end] for end in rounds]
    assert all(read[: len(rounds)])  # in consecutive rounds
