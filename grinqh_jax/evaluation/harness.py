"""An adapter to lm-evaluation-harness: its tasks on a GRINQH checkpoint, at a setting of the dial.

    python -m grinqh_jax lm-eval --model grinqh --model_args pretrained=DIR,bits=3 --batch_size 8 --tasks TASK

or, from Python, where importing this module registers the name ``grinqh``:

    from grinqh_jax.evaluation.harness import GrinqhLM
    lm_eval.simple_evaluate(GrinqhLM("DIR", bits=3), tasks=["arc_easy"])

Log-likelihoods read every token graded, as ``perplexity`` does; texts are generated with dense prefill and
graded decoding, as ``generate`` does. Needs the extra ``eval``.
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
from grinqh_jax.errors import UsageError
from grinqh_jax.evaluation.completion import complete
from grinqh_jax.evaluation.scoring import Score, mean_bits, score

MAX_LENGTH = 4096
"""Tokens of a request by default, where the model has positions for more."""


@register_model("grinqh")
class GrinqhLM(TemplateLM):
    """A GRINQH checkpoint, or an unquantized one, as the harness sees a model.

    Args:
      pretrained: a directory or a hub id.
      bits: setting of the dial, or ``"full"``; None takes the default of ``generate``.
      batch_size: most requests at a time; the harness's ``auto`` takes the default.
      max_length: most tokens of a request; longer ones lose their beginning.
      max_gen_toks: tokens to generate where a task does not say.
      device, max_batch_size: the harness passes them; JAX has chosen the device already.

    Raises:
      GrinqhError: there is no such checkpoint or setting.
    """

    def __init__(
        self,
        pretrained: str,
        bits: Bits | None = None,
        batch_size: int | str = 64,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        device: Any = None,
        max_batch_size: Any = None,
    ):
        super().__init__()
        del device, max_batch_size
        self.generator = Generator.load(pretrained)
        dial = self.generator.bits(bits)
        self.bits = FULL if bits == FULL or dial is None else dial
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 64
        most = self.generator.model.config.max_position_embeddings
        self.max_length = min(max_length or MAX_LENGTH, most)
        self.max_gen_toks = max_gen_toks
        self._scores: list[Score] = []
        self._generated_bits: list[float] = []

    @property
    def eot_token_id(self) -> int:
        """The first of the tokens that end a text."""
        eos = self.generator.defaults.eos_tokens
        if not eos:
            raise UsageError(f"{self.generator.directory} names no EOS token (generation_config.json)")
        return eos[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: BOS, or for want of one EOS."""
        bos = self.generator.defaults.bos_token
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text; ``add_special_tokens`` None adds them where the text does not begin with BOS."""
        plain = self.generator.tokenizer.encode(string, special_tokens=False)
        begun = add_special_tokens is None and plain[:1] == [self.generator.defaults.bos_token]
        if begun or add_special_tokens is False:
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
        results = [(one.log_likelihood, one.greedy) for one in scores]
        for (texts, _, _), result in zip(requests, results, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, cut into windows that do not overlap (``TemplateLM``)."""
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
        for i, one in zip(owners, self._score(pairs, disable_tqdm), strict=True):
            totals[i] += one.log_likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop text of the task; a task's sampling flags are obeyed."""
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
                found = complete(
                    self.generator,
                    [self.tok_encode(requests[i].args[0])[-room:] or [self.prefix_token_id] for i in group],
                    self.bits,
                    max_tokens=options.max_tokens,
                    batch=self.batch_size,
                    ended=lambda text, stops=options.stops: any(stop in text for stop in stops),
                    sampling=options.sampling,
                    on_progress=bar.update,
                )
                read = found.bits.mean(self.generator.model)
                self._generated_bits += [] if read is None else [read] * len(group)
                for i, text in zip(group, found.texts, strict=True):
                    texts[i] = options.cut(text)
                    self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
        return texts

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation."""
        return self.generator.tokenizer.chat_text(chat_history, add_generation_prompt=add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        """For the harness's caches."""
        return str(self.generator.directory).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What the harness records beside the results: the bits asked for, and those that were read."""
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
    """A bar on stderr; silent if the harness asks for that, and where stderr is not a terminal."""
    return tqdm(total=requests, desc=description, unit="request", disable=disable or None)


class _Options:
    """A task's ``generation_kwargs``."""

    def __init__(self, given: dict[str, Any], max_tokens: int):
        until = given.get("until") or []
        self.stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        self.max_tokens = int(next((given[name] for name in names if given.get(name)), max_tokens))
        self.sampling: dict[str, Any] = {}
        temperature = given.get("temperature")
        if given.get("do_sample", bool(temperature)):
            self.sampling["temperature"] = 1.0 if temperature is None else float(temperature)
            self.sampling |= {
                name: given[name] for name in ("top_k", "top_p", "min_p", "seed") if name in given
            }

    def cut(self, text: str) -> str:
        """The text before the first stop."""
        for stop in self.stops:
            text = text.split(stop)[0]
        return text
