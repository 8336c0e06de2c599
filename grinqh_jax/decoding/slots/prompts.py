"""Programs that read a prompt in prefill chunks into the pages of its text."""

import jax
from jaxtyping import Array, Float, Int

from grinqh_jax.decoding import engine
from grinqh_jax.decoding.dial import Dial, DialState
from grinqh_jax.decoding.engine.prompt_logprobs import prompt_logprobs as logprobs_of_prompt
from grinqh_jax.decoding.logprobs import TokenLogprobs
from grinqh_jax.decoding.paged_cache import PagedCache
from grinqh_jax.decoding.programs import LAUNCHED_ONE_BY_ONE
from grinqh_jax.decoding.slots.prefix import Prefix
from grinqh_jax.decoding.thresholds import StackedThresholds
from grinqh_jax.model.flat_model import FlatModel
from grinqh_jax.sharding.program import on_mesh


@jax.jit
def preview_thresholds(dial: Dial, bits: Float[Array, "1"]) -> StackedThresholds:
    """Returns the thresholds of a text before its first token.

    This is not part of ``prefill``, where XLA (jax 0.10.2, on a CPU) interpolates the thresholds again for
    every channel of every layer: 25 ms instead of 16 for a prompt of 9 tokens and the bundled model.

    Args:
      dial: Dial of the model; its state is ignored.
      bits: Wanted mean bits.
    """
    return dial.with_state(DialState.create(bits)).thresholds


@jax.jit(static_argnames="pages_read", donate_argnames="cache", compiler_options=LAUNCHED_ONE_BY_ONE)
@on_mesh
def prefill(
    model: FlatModel,
    cache: PagedCache,
    prefix: Prefix,
    tokens: Int[Array, "1 t"],
    true_length: Int[Array, "1"],
    thresholds: StackedThresholds | None,
    *,
    pages_read: int,
) -> tuple[PagedCache, Prefix]:
    """Reads the next prefill chunk of a prompt at full precision.

    Args:
      model: Graded model; or a dense one, with ``thresholds=None``.
      cache: Pages of all texts. Donated.
      prefix: What has been read of the prompt.
      tokens: Next tokens, right-padded with any valid token.
      true_length: Number of tokens without padding.
      thresholds: Thresholds for the preview (see ``preview_thresholds``).
      pages_read: Number of leading pages of the text that these tokens attend to. They hold all of them.

    Returns:
      The pages, with the keys and values of the new tokens, and the longer prefix.
    """
    text = cache.texts(prefix.pages[:, :pages_read], prefix.length, prefix.fixed)
    if thresholds is None:
        logits, text = engine.prefill(model, tokens, true_length, text)
        preview = None
    else:
        logits, text, preview = engine.prefill_with_preview(model, tokens, true_length, text, thresholds)
        assert prefix.preview is not None, "a graded model has previews"
        preview = engine.merge_previews(prefix.preview, preview)
    return PagedCache.of(text), Prefix(prefix.pages, text.lengths, logits, preview, text.fixed)


@jax.jit(static_argnames=("pages_read", "top_logprobs"), donate_argnames="cache")
@on_mesh
def prompt_logprobs(
    model: FlatModel,
    cache: PagedCache,
    prefix: Prefix,
    tokens: Int[Array, "1 t"],
    following: Int[Array, "1 t"],
    *,
    pages_read: int,
    top_logprobs: int,
) -> tuple[PagedCache, TokenLogprobs]:
    """Returns the log-probabilities of the prompt tokens after those of a prefill chunk that is not read yet.

    Args:
      model: Graded or dense model.
      cache: Pages of all texts. Donated.
      prefix: What has been read of the prompt.
      tokens: Tokens of the chunk, right-padded with any valid token.
      following: Token after each of them.
      pages_read: As in ``prefill``.
      top_logprobs: As in ``answers.generate``.
    """
    text = cache.texts(prefix.pages[:, :pages_read], prefix.length, prefix.fixed)
    logprobs, text = logprobs_of_prompt(model, tokens, following, text, top_logprobs)
    return PagedCache.of(text), logprobs
