"""Adapter that runs the tasks of lm-evaluation-harness on a GRINQH checkpoint.

    grinqh-jax lm-eval --model grinqh --model_args pretrained=DIR,bits=3 --batch_size 8 --tasks TASK

From Python, importing this module registers the model name ``grinqh``:

    from grinqh_jax.evaluation.harness import GrinqhLM
    lm_eval.simple_evaluate(GrinqhLM("DIR", bits=3), tasks=["arc_easy"])

Log-likelihoods are computed with every token graded, as in ``perplexity``. Texts are generated with a prefill
at full precision and graded decoding, as in ``generate``. Needs the extra ``eval``.
"""

import json
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from grinqh_jax.decoding.bits import FULL, Bits
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.decoding.penalties import NEUTRAL
from grinqh_jax.errors import UsageError
from grinqh_jax.evaluation import harness_args
from grinqh_jax.evaluation.completion import complete
from grinqh_jax.evaluation.scoring import Score, mean_bits, score

MAX_LENGTH = 4096
"""Largest number of tokens of a request by default; the model's context may be shorter."""


@register_model("grinqh")
class GrinqhLM(TemplateLM):
    """A GRINQH checkpoint, or an unquantized one, as a model of the harness.

    Args:
      pretrained: Directory or hub id.
      bits: Setting of the dial, or ``"full"``; None selects the default of ``generate``.
      batch_size: Largest number of requests read together; ``auto`` selects the default.
      max_length: Largest number of tokens of a request. The start of a longer request is dropped.
      max_gen_toks: Number of tokens to generate if the task does not set one.
      dtype: Dtype of hidden states and matrix products: ``float32``, ``bfloat16``, or ``auto``.
      other: Other ``model_args`` (``harness_args.check``).

    Raises:
      GrinqhError: The checkpoint cannot be loaded, the setting is out of the dial's range, or an argument is
        unknown or has a wrong value.
    """

    def __init__(
        self,
        pretrained: str,
        bits: Bits | None = None,
        batch_size: int | str = 64,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        dtype: Any = "auto",
        **other: Any,
    ):
        super().__init__()
        harness_args.check(other)
        self.generator = Generator.load(pretrained, harness_args.compute_dtype(dtype))
        dial = self.generator.bits(bits)
        self.bits: Bits = FULL if bits == FULL or dial is None else dial
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 64
        most = self.generator.model.config.max_position_embeddings
        self.max_length = min(max_length or MAX_LENGTH, most)
        self.max_gen_toks = max_gen_toks
        self._template: str | None = None
        self._scores: list[Score] = []
        self._generated_bits: list[float] = []

    @property
    def eot_token_id(self) -> int:
        """The first EOS token of the model."""
        eos = self.generator.defaults.eos_tokens
        if not eos:
            raise UsageError(f"{self.generator.directory} names no EOS token (generation_config.json)")
        return eos[0]

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: BOS, or EOS if the model has no BOS."""
        bos = self.generator.defaults.bos_token
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokenizes a text. ``add_special_tokens=None`` adds them unless the text begins with BOS."""
        plain = self.generator.tokenizer.encode(string, special_tokens=False)
        has_bos = plain[:1] == [self.generator.defaults.bos_token]
        if add_special_tokens is False or (add_special_tokens is None and has_bos):
            return plain
        return self.generator.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs,
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        scores = self._score(pairs, disable_tqdm)
        results = [(result.log_likelihood, result.greedy) for result in scores]
        for (texts, _, _), result in zip(requests, results, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of each whole text, cut into windows that do not overlap."""
        pairs, owners = [], []
        for i, request in enumerate(requests):
            (text,) = request.args
            windows = get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False), self.prefix_token_id, self.max_length, 1
            )
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, window_score in zip(owners, self._score(pairs, disable_tqdm), strict=True):
            totals[i] += window_score.log_likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generates continuations up to a stop string of the task, with the task's sampling options."""
        by_options: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            by_options.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        texts = [""] * len(requests)
        with _progress_bar("generate_until", len(requests), disable_tqdm) as bar:
            for group in by_options.values():
                options = _Options(requests[group[0]].args[1], self.max_gen_toks)
                room = self.max_length - options.max_tokens
                if room < 1:
                    raise UsageError(
                        f"{options.max_tokens} tokens to generate leave no room for a prompt in "
                        f"{self.max_length}; raise max_length or lower max_gen_toks"
                    )
                completions = complete(
                    self.generator,
                    [self.tok_encode(requests[i].args[0])[-room:] or [self.prefix_token_id] for i in group],
                    self.bits,
                    max_tokens=options.max_tokens,
                    batch=self.batch_size,
                    ended=options.ended,
                    sampling=options.sampling,
                    on_progress=bar.update,
                )
                read = completions.bits.mean(self.generator.model)
                self._generated_bits += [] if read is None else [read] * len(group)
                for i, text in zip(group, completions.texts, strict=True):
                    texts[i] = options.cut(text)
                    self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
        return texts

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns a conversation as text, in the template that ``chat_template`` has chosen."""
        return self.generator.tokenizer.chat_text(
            chat_history, template=self._template, add_generation_prompt=add_generation_prompt
        )

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Chooses a chat template, by name or the default for True, and returns its source.

        The harness calls it with the value of ``--apply_chat_template`` before any other method, and records
        the source with the results.
        """
        if not chat_template:
            return ""
        self._template = chat_template if isinstance(chat_template, str) else None
        return self.generator.tokenizer.chat_template(self._template)

    @property
    def tokenizer_name(self) -> str:
        """The name that the harness's caches use."""
        return str(self.generator.directory).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Returns the setting of the dial and the bits read, which the harness records with the results."""
        generated = self._generated_bits
        return {
            "bits": self.bits,
            "realised_bits_loglikelihood": mean_bits(self._scores),
            "realised_bits_generation": sum(generated) / len(generated) if generated else None,
        }

    def _score(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], disable_tqdm: bool = True
    ) -> list[Score]:
        with _progress_bar("loglikelihood", len(pairs), disable_tqdm) as bar:
            scores = score(
                self.generator,
                pairs,
                self.bits,
                max_length=self.max_length,
                batch=self.batch_size,
                on_progress=bar.update,
            )
        self._scores += scores
        return scores


def _progress_bar(description: str, requests: int, disable: bool) -> tqdm:
    """Returns a progress bar on stderr, silent if ``disable`` is set or stderr is not a terminal."""
    return tqdm(total=requests, desc=description, unit="request", disable=disable or None)


class _Options:
    """The ``generation_kwargs`` of a task: stop strings, largest number of tokens, sampling parameters."""

    def __init__(self, given: dict[str, Any], max_tokens: int):
        until = given.get("until") or []
        self.stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        self.max_tokens = int(next((given[name] for name in names if given.get(name)), max_tokens))
        self.sampling: dict[str, Any] = {name: float(given[name]) for name in NEUTRAL if name in given}
        temperature = given.get("temperature")
        if given.get("do_sample", bool(temperature)):
            self.sampling["temperature"] = 1.0 if temperature is None else float(temperature)
            self.sampling |= {
                name: given[name] for name in ("top_k", "top_p", "min_p", "seed") if name in given
            }

    def ended(self, text: str) -> bool:
        """Whether a text contains a stop string."""
        return any(stop in text for stop in self.stops)

    def cut(self, text: str) -> str:
        """Returns the text before the first stop string."""
        for stop in self.stops:
            text = text.split(stop)[0]
        return text
