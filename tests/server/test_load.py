"""Many clients at once on the bundled model: every answer is that of the same request alone."""

import random
import threading
import time

import numpy as np
import openai
import pytest
from server_process import serving

pytestmark = pytest.mark.slow

CLIENTS, CASES = 32, 40
ROUNDS = (500, 150, 150)
TEXT = "the old house stood near a river and nobody had lived there for many years until one day"


def case(rng: random.Random) -> dict:
    """Fields of a completion with any length, bits and sampling."""
    prompt = " ".join(rng.choices(TEXT.split(), k=rng.choice([1, 3, 20, 60])))
    sampled = rng.random() < 0.4
    return {
        "prompt": prompt,
        "max_tokens": rng.randrange(1, 17),
        "temperature": rng.choice([0.7, 1.0]) if sampled else 0,
        "seed": rng.randrange(1000),
        "stop": rng.choice([None, None, ["a"]]),
        "extra_body": {"bits": rng.choice([1.5, 2.5, 3, 4, "full"]), "top_k": 20 if sampled else 0},
    }


def generate(client: openai.OpenAI, fields: dict, gaps: list[float], leave: bool = False) -> str | None:
    """The text of a streamed answer; None if the client leaves after the first event."""
    stream = client.completions.create(model="qwen3-7m", stream=True, **fields)
    text, last = "", None
    for event in stream:
        now = time.perf_counter()
        if last is not None:
            gaps.append(now - last)
        last = now
        text += event.choices[0].text
        if leave:
            stream.close()
            return None
    assert event.choices[0].finish_reason in ("stop", "length")
    return text


def round_of_requests(server, cases: list[dict], count: int) -> tuple[list[tuple[int, str]], list[float]]:
    """Runs all requests from all clients; returns case and text of each, and the gaps between events."""
    rng = random.Random(count)
    work = [(rng.randrange(len(cases)), rng.random() < 0.1) for _ in range(count)]
    results: list[tuple[int, str | None]] = []
    gaps: list[float] = []
    errors: list[BaseException] = []

    def run() -> None:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, timeout=120) as client:
            while work:
                try:
                    number, leave = work.pop()
                    results.append((number, generate(client, cases[number], gaps, leave)))
                except BaseException as error:
                    errors.append(error)
                    raise

    clients = [threading.Thread(target=run) for _ in range(CLIENTS)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    assert not errors
    assert len(results) == count
    return [(number, text) for number, text in results if text is not None], gaps


@pytest.mark.timeout(900)
def test_answers_do_not_depend_on_load_and_memory_is_flat(record_property):
    rng = random.Random(0)
    cases = [case(rng) for _ in range(CASES)]
    flags = ("--slots", "8", "--max-context", "256", "--prefill-chunk", "64")
    optimized = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}
    with serving(*flags, env=optimized) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            alone = [generate(client, fields, []) for fields in cases]
        memory = []
        for count in ROUNDS:
            started = time.monotonic()
            results, gaps = round_of_requests(server, cases, count)
            assert [(number, text) for number, text in results if text != alone[number]] == []
            memory.append(server.resident_bytes())
            print(f"{count} requests: {time.monotonic() - started:.0f} s", flush=True)
        p50, p99 = np.percentile(gaps, [50, 99])
        record_property("gap_ms", f"p50 {p50 * 1e3:.1f}, p99 {p99 * 1e3:.1f}")
        print(f"gaps between events: p50 {p50 * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms; memory {memory}")
        assert memory[2] - memory[1] < 16 << 20
        deadline = time.monotonic() + 30
        while server.metric("grinqh_answers_total") < CASES + sum(ROUNDS) and time.monotonic() < deadline:
            time.sleep(0.1)  # Clients that left do not wait for their answers to end.
        assert server.metric("grinqh_cache_pages_in_use") == 0
        assert server.metric("grinqh_answers_total") == CASES + sum(ROUNDS)
        assert server.stop() == 0
