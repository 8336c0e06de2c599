"""Calibration text that the model samples itself, at full precision."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from checkpoints_tools.calibration import documents
from grinqh_jax.decoding.engine import decode_chunk, prefill
from grinqh_jax.decoding.generation_config import GenerationConfig
from grinqh_jax.decoding.sampling import Sampling
from grinqh_jax.hf import HFCheckpoint, load_decoder
from grinqh_jax.model.cache import KVCache
from grinqh_jax.model.decoder import Decoder
from grinqh_jax.text.tokenizer import Tokenizer

BATCH = 16
"""Number of texts that are sampled together."""

ANSWER = 512
"""Maximum number of sampled tokens of a text."""

OPENING = 24
"""Number of tokens of a document that a sampled text begins with."""

PROMPT = 128
"""Maximum number of tokens of a prompt; longer prompts are not used."""

TOP_P = 0.95
"""Probability mass that tokens are sampled from, at temperature 1."""


def sampled_windows(
    source: HFCheckpoint, tokenizer: Tokenizer, tokens: int, length: int, seed: int = 0
) -> Int32[np.ndarray, "s t"]:
    """Samples text from a model and cuts it into windows.

    The texts continue prompts: the first turns of the conversations in ``mixed``, with the model's chat
    template, if it has one, and the openings of the other documents. The whole model is in memory.

    Args:
      source: Checkpoint of the model.
      tokenizer: Its tokenizer.
      tokens: Number of tokens, rounded down to whole windows, at least one.
      length: Tokens of a window, at most ``tokens``.
      seed: Seed of sampling. The same seed gives the same text on the same device.

    Raises:
      CheckpointError: ``generation_config.json`` is damaged, or a file vanished.
    """
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    decoder = load_decoder(source, dtype)
    ends = GenerationConfig.load(source.directory).eos_tokens
    start = tokenizer.encode("")
    length = min(length, tokens)
    count = max(tokens // length, 1)
    stream: list[int] = []
    width = min(PROMPT, source.config.max_position_embeddings // 2)
    batches = _batches(_prompts(tokenizer, width))
    while len(stream) < count * (length - len(start)):
        for text in _sample(decoder, next(batches), width, ends, dtype, seed):
            stream += text[len(start) :] if text[: len(start)] == start else text
        seed += BATCH
    body = np.array(stream[: count * (length - len(start))], np.int32).reshape(count, -1)
    return np.concatenate([np.tile(np.array(start, np.int32), (count, 1)), body], axis=1)


def _prompts(tokenizer: Tokenizer, longest: int) -> list[list[int]]:
    """Returns the tokens of the prompts, kinds of texts alternating."""
    prompts = []
    for document in documents.mixed():
        if isinstance(document, str):
            prompts.append(tokenizer.encode(document)[: min(OPENING, longest)])
        elif tokenizer.has_chat_template:
            prompts.append(tokenizer.chat(document[:1]))
        else:
            text = documents.render(document, tokenizer)
            prompts.append(tokenizer.encode(text)[: min(OPENING, longest)])
    return [prompt for prompt in prompts if len(prompt) <= longest]


def _batches(prompts: list[list[int]]) -> Iterator[list[list[int]]]:
    """Yields batches of prompts for ever; each starts where the last one ended."""
    position = 0
    while True:
        yield [prompts[(position + i) % len(prompts)] for i in range(BATCH)]
        position += BATCH


def _sample(
    decoder: Decoder, prompts: list[list[int]], width: int, ends: tuple[int, ...], dtype, seed: int
) -> list[list[int]]:
    """Samples one continuation of each prompt, of ``width`` tokens or fewer; returns the tokens of both."""
    steps = min(ANSWER, decoder.config.max_position_embeddings - width)
    lengths = np.array([len(prompt) for prompt in prompts])
    padded = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    cache = KVCache.create(decoder.config, len(prompts), width + steps, dtype)
    # The last token of a prompt is the first input of the decoding loop, which then samples every new token.
    _, cache = prefill(decoder, jnp.asarray(padded), jnp.asarray(lengths - 1), cache)
    chunk, _ = decode_chunk(
        decoder,
        jnp.asarray(padded[np.arange(len(prompts)), lengths - 1]),
        jnp.zeros(len(prompts), bool),
        cache,
        None,
        Sampling.create(len(prompts), temperature=1.0, top_p=TOP_P, seed=seed),
        jnp.array(ends, jnp.int32),
        jnp.full(len(prompts), steps),
        steps=steps,
    )
    tokens, counts = np.asarray(chunk.tokens), np.asarray(chunk.counts)
    return [[*prompt, *tokens[i, : counts[i]].tolist()] for i, prompt in enumerate(prompts)]
