"""The engine as a library: requests from any thread in, answers out, all decoded together on one model.

generator = Generator.load("path/to/checkpoint")
with Engine(generator) as engine:
    answers = engine.generate_many(["Once upon a time", "There was"], Request(bits=3.0))
    async for piece in engine.submit("In the morning", Request(bits=2.5)):
        print(piece.text, end="", flush=True)
"""

import functools
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grinqh_jax.decoding.answer_text import AnswerText
from grinqh_jax.decoding.batching.job import Job
from grinqh_jax.decoding.batching.scheduler import Scheduler
from grinqh_jax.decoding.bits import Bits
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.decoding.logprobs import MOST_LOGPROBS
from grinqh_jax.decoding.policy import DecodePolicy
from grinqh_jax.decoding.reading import MAX_GRADED_ROWS
from grinqh_jax.decoding.request import Request
from grinqh_jax.decoding.speculation.speculation import Speculation
from grinqh_jax.decoding.statistics import calibrated_ranges
from grinqh_jax.errors import UsageError
from grinqh_jax.serving.answer import Answer
from grinqh_jax.serving.engine_device import engine_device, request_settings
from grinqh_jax.serving.errors import EngineError
from grinqh_jax.serving.grammar import Grammar, Grammars
from grinqh_jax.serving.processes import Leader
from grinqh_jax.serving.shared_pages import SharedPages
from grinqh_jax.serving.sizes import PAGE_SIZE, PREFILL_CHUNK
from grinqh_jax.serving.stats import EngineStats
from pallas_kernels.x64 import without_x64


class Engine:
    """Serves requests on the model of a ``Generator`` until it is closed. A context manager.

    The engine has a thread, which alone uses the device. An exception there, for instance because memory runs
    out, ends all answers with an ``EngineError``; the engine then takes no further request.

    Attributes:
      shape: Sizes of the engine.
      scheduler, storage: Scheduler and pages of the engine. Only the engine's thread may call their methods.
    """

    @without_x64
    def __init__(
        self,
        generator: Generator,
        *,
        slots: int = 8,
        max_context: int | None = None,
        cache_memory: int | None = None,
        page_size: int = PAGE_SIZE,
        prefill_chunk: int = PREFILL_CHUNK,
        prompt_logprobs: bool = False,
        share_prefixes: bool = True,
        grammars: bool = False,
        policy: DecodePolicy | None = None,
        speculation: Speculation | None = None,
        leader: Leader | None = None,
    ):
        """Allocates the cache and compiles all programs, several at once, which takes seconds to minutes.

        Args:
          generator: Model, tokenizer and defaults.
          slots: Number of requests that are decoded at once, 1 to ``sizes.MOST_SLOTS``. Up to
            ``reading.MAX_GRADED_ROWS`` slots are graded. With more, all running requests read weights at one
            level, of at least the bits that each of them asks for.
          max_context: Most tokens of prompt and answer together, by default all positions of the model.
          cache_memory: Bytes of keys and values on each device, by default those of ``slots`` texts of
            ``max_context`` tokens, or fewer if the device has less free memory.
          page_size: Number of positions of a page of the cache.
          prefill_chunk: Number of prompt tokens read in one call, a multiple of ``page_size``. Running
            answers pause for at most as many tokens, and prefixes are shared in whole prefill chunks.
          prompt_logprobs: Whether requests may ask for log-probabilities of their prompts, which takes more
            programs.
          share_prefixes: Whether texts with the same leading tokens share their pages. Without, layers with
            windows keep as many tokens as the window has, in place of the whole context, which takes less
            memory. Models with recurrent states never share prefixes.
          grammars: Whether requests may have grammars, which takes one more program.
          policy: How programs are compiled, by default ``DecodePolicy.for_engine()``.
          speculation: How to speculate, by default not at all.
          leader: Connections to the other processes of the mesh, which follow; None for one process.

        Raises:
          UsageError: An argument is out of range, or the device has too little free memory.
        """
        policy = policy or DecodePolicy.for_engine()
        device = engine_device(
            generator,
            policy,
            speculation,
            slots=slots,
            max_context=max_context,
            cache_memory=cache_memory,
            page_size=page_size,
            prefill_chunk=prefill_chunk,
            prompt_logprobs=prompt_logprobs,
            share_prefixes=share_prefixes,
            grammars=grammars,
        )
        if leader is not None:
            leader.lead(device)
        self.shape, self._generator, self._leader = device.shape, generator, leader
        # Fetched once: at the end of an answer the device is busy with others.
        self._ranges = calibrated_ranges(generator.model) if device.graded else None
        self._grammars = Grammars(generator)
        if grammars:
            self._grammars.prepare()
        self.storage = SharedPages(self.shape, device.graded)
        self.scheduler = Scheduler(device, self.storage, policy)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._jobs: dict[Answer, Job] = {}  # unfinished ones
        self._turns: dict[Job, float] = {}  # wanted bits, of jobs with a command that turns them
        self._lock = threading.Lock()
        self._closed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="grinqh-jax engine", daemon=True)
        self._thread.start()

    @property
    def error(self) -> BaseException | None:
        """Reason why the engine takes no requests; None while it takes them."""
        return self._closed

    def stats(self) -> EngineStats:
        """Returns how much of the engine is in use. May be called from any thread."""
        scheduler, pages = self.scheduler, self.storage.allocator
        return EngineStats(
            waiting=len(scheduler.waiting),
            reading=len(scheduler.reading),
            decoding=len(scheduler.decoding),
            slots=self.shape.slots,
            pages=pages.num_pages,
            pages_in_use=pages.in_use,
            pages_kept=pages.kept,
            pages_evicted=pages.evicted,
            prompt_tokens=scheduler.prompt_tokens,
            reused_tokens=scheduler.reused_tokens,
        )

    def submit(
        self,
        prompt: str | Sequence[int],
        request: Request | None = None,
        *,
        priority: int = 0,
        top_logprobs: int | None = None,
        prompt_logprobs: bool = False,
        grammar: Grammar | None = None,
    ) -> Answer:
        """Queues a request and returns its answer, which grows while the engine decodes.

        Args:
          prompt: Plain text or tokens, as in ``Generator.generate``.
          request: What to generate.
          priority: Requests with a lower number come first; those with the same number in order of arrival.
          top_logprobs: Number of most likely tokens, 0 to ``MOST_LOGPROBS``, whose log-probabilities the
            answer has beside those of its tokens; None for no log-probabilities.
          prompt_logprobs: Whether the answer also has log-probabilities of the tokens of the prompt, at full
            precision, as prompts are read. Each prefill chunk is then read twice.
          grammar: Grammar that the answer fits unless it ends at its limit; None for any text. Until such an
            answer ends, decode chunks have one step.

        Raises:
          UsageError: The request is invalid (see ``Generator.generate``), or can never fit into the cache.
          EngineError: The engine has failed or was closed.
        """
        request = request or Request()
        tokens = self._generator.prompt_tokens(prompt)
        limit = max(min(request.max_tokens, self.shape.max_context - len(tokens)), 0)
        self.storage.check(len(tokens), limit)
        if top_logprobs is not None and not 0 <= top_logprobs <= MOST_LOGPROBS:
            raise UsageError(f"top_logprobs is {top_logprobs}, expected 0 to {MOST_LOGPROBS}")
        if prompt_logprobs and (top_logprobs is None or not self.shape.prompt_logprobs):
            raise UsageError(
                "prompt_logprobs needs an engine created with prompt_logprobs=True, and top_logprobs of the "
                "request; give both"
            )
        if grammar is not None:
            self._check_grammars()
            grammar = grammar.copy()
        settings = request_settings(self._generator, self.shape, request, limit)
        stop_tokens = self._generator.stop_tokens(request)
        text = AnswerText(self._generator.tokenizer.stream(), request.stop, stop_tokens)
        one_level = self.shape.slots > MAX_GRADED_ROWS
        answer = Answer(
            self._generator.model, tokens, text, top_logprobs, one_level=one_level, ranges=self._ranges
        )
        job = Job(tokens, settings, answer, top_logprobs is not None, prompt_logprobs, priority, grammar)
        with self._lock:
            self._check_open()
            self._jobs[answer] = job
            self._commands.put(functools.partial(self.scheduler.add, job))
        return answer

    def grammar(self, schema: Mapping[str, Any]) -> Grammar:
        """Returns a grammar of the JSON texts that fit a schema, for any number of requests.

        This takes milliseconds, up to seconds for a large schema.

        Args:
          schema: JSON schema. References lead to the schema itself only; nothing is loaded.

        Raises:
          UsageError: The schema is invalid, too large, or not supported; the engine has no grammars;
            llguidance is not installed, or does not support the tokenizer.
        """
        self._check_grammars()
        return self._grammars.of_schema(schema)

    def grammar_of_rules(self, rules: str, schemas: Mapping[str, Mapping[str, Any]]) -> Grammar:
        """Returns a grammar of texts that contain JSON, for any number of requests.

        Args:
          rules: Rules in llguidance's dialect of Lark. The rule ``start`` is the whole text.
          schemas: JSON schema of each rule that ``rules`` uses and does not define.

        Raises:
          UsageError: As in ``grammar``.
        """
        self._check_grammars()
        return self._grammars.of_rules(rules, schemas)

    def generate_many(
        self, prompts: Sequence[str | Sequence[int]], request: Request | Sequence[Request] | None = None
    ) -> list[Answer]:
        """Generates the answers to all prompts and waits for them.

        Args:
          prompts: Plain texts or tokens.
          request: What to generate; the same for all prompts, or one for each.

        Returns:
          Finished answers in the order of the prompts.

        Raises:
          UsageError: A request is invalid or can never fit, or their number differs from that of the prompts.
            No answer is then generated.
          EngineError: The engine or an answer has failed, or the engine was closed.
        """
        requests = request if isinstance(request, Sequence) else [request] * len(prompts)
        if len(requests) != len(prompts):
            raise UsageError(
                f"{len(prompts)} prompts and {len(requests)} requests; give one for each, or one for all"
            )
        answers: list[Answer] = []
        try:
            for prompt, each in zip(prompts, requests, strict=True):
                answers.append(self.submit(prompt, each))
            for answer in answers:
                answer.result()
        except BaseException:
            for answer in answers:
                self.cancel(answer)
            raise
        return answers

    def cancel(self, answer: Answer) -> None:
        """Ends an answer within one decode chunk; does nothing if it has ended."""
        with self._lock:
            job = self._jobs.get(answer)
            if job is not None:
                self._commands.put(functools.partial(self.scheduler.cancel, job))

    def turn(self, answer: Answer, bits: Bits) -> None:
        """Changes the wanted mean bits of an answer from its next decode chunk on.

        Raises:
          UsageError: ``bits`` is outside the dial's range, or the model is not quantized.
        """
        wanted = self._generator.bits(bits)
        with self._lock:
            job = self._jobs.get(answer)
            if job is None or wanted is None:
                return
            if job not in self._turns:
                self._commands.put(functools.partial(self._turn, job))
            self._turns[job] = wanted

    def close(self) -> None:
        """Ends the engine. Unfinished answers end with an ``EngineError``."""
        with self._lock:
            if self._closed is None:
                self._closed = EngineError("it was closed")
            self._commands.put(lambda: None)  # wakes the thread
        self._thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    @without_x64
    def _run(self) -> None:
        """Runs commands and rounds of the scheduler until the engine is closed or fails."""
        try:
            while self._closed is None:
                if self.scheduler.idle:
                    self._commands.get()()
                for _ in range(self._commands.qsize()):  # Those that come meanwhile wait for a round.
                    self._commands.get()()
                if self._closed is None:
                    self.scheduler.step()
                self._forget_ended()
        except Exception as error:
            with self._lock:
                self._closed = error
        self.scheduler.close()
        if self._leader is not None:
            self._leader.close()
        with self._lock:
            unfinished, self._jobs = self._jobs, {}
        for answer, job in unfinished.items():
            if not job.ended:
                failure = EngineError(f"the engine ended before the answer: {self._closed}")
                failure.__cause__ = self._closed
                answer.fail(failure)

    def _turn(self, job: Job) -> None:
        """Turns a job to the last bits that were wanted, so that many turns cost a round only one."""
        with self._lock:
            wanted = self._turns.pop(job)
        self.scheduler.turn(job, wanted)

    def _forget_ended(self) -> None:
        with self._lock:
            for answer in [answer for answer, job in self._jobs.items() if job.ended]:
                del self._jobs[answer]

    def _check_grammars(self) -> None:
        if not self.shape.grammars:
            raise UsageError("a grammar needs an engine created with grammars=True; leave it out")

    def _check_open(self) -> None:
        if self._closed is not None:
            raise EngineError(
                f"the engine takes no requests, because it ended: {self._closed}; create another"
            )
