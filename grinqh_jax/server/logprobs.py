"""Log-probabilities of tokens in the shapes of the two endpoints."""

from collections.abc import Sequence
from typing import Any

from grinqh_jax.serving.answer import TokenLogprob
from grinqh_jax.text.tokenizer import Tokenizer

Logprob = TokenLogprob | tuple[int, None, None]
"""Token, log-probability and alternatives. The first token of a prompt has neither."""


def chat_logprobs(tokens: Sequence[TokenLogprob], tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the field ``logprobs`` of a choice of a chat."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        known = tokenizer.token_bytes(token)
        return {
            "token": tokenizer.token_text(token),
            "logprob": logprob,
            "bytes": None if known is None else list(known),
        }

    content = [
        entry(each.token, each.logprob) | {"top_logprobs": [entry(*other) for other in each.top]}
        for each in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokens: Sequence[Logprob], tokenizer: Tokenizer, offset: int, alternatives: bool
) -> dict[str, Any]:
    """Returns the field ``logprobs`` of a choice of a text completion.

    Args:
      tokens: Tokens with their log-probabilities.
      tokenizer: Tokenizer of the model.
      offset: Number of characters before the first token.
      alternatives: Whether to list the most likely tokens.
    """
    texts = [tokenizer.token_text(token) for token, _, _ in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [logprob for _, logprob, _ in tokens],
        "top_logprobs": [
            None if top is None else {tokenizer.token_text(token): logprob for token, logprob in top}
            for _, _, top in tokens
        ]
        if alternatives
        else None,
        "text_offset": offsets,
    }
