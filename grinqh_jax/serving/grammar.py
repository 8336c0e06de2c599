"""JSON schemas as masks of the tokens that an answer may go on with, computed by llguidance on the host."""

import contextlib
import json
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt32

from grinqh_jax.decoding.generator import Generator
from grinqh_jax.errors import UsageError

SHOWN_CHARACTERS = 200
"""Most characters of llguidance's messages that an error shows. They can quote the whole schema."""

MOST_OBJECTS = 2000
"""Most JSON objects of a schema. Compiling more takes seconds."""

MOST_REFERENCES = 256
"""Most different references of a schema. llguidance (1.9.1) follows a chain of references by recursion in
native code, and about 1,000 of them overflow a stack of 8 MiB, which ends the process."""

SPELLING: Any = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""How objects are written: as Python's ``json`` does, on one line. A model that may write any white space
can do so without end."""


class Grammar:
    """The part of an answer that is still to come, as a grammar. A ``job.TokenGrammar``."""

    def __init__(self, matcher: Any, words: int):
        self._matcher = matcher
        self._words = words

    def copy(self) -> "Grammar":
        """Returns a grammar with the same tokens so far."""
        return Grammar(self._matcher.deep_copy(), self._words)

    def allowed(self) -> UInt32[np.ndarray, "words"]:
        """Returns the tokens that may come next (see ``sampling.Sampling.allowed``).

        Raises:
          UsageError: The schema is too complex, or no token fits.
        """
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: self._words]
        self._check()
        if not mask.any():
            raise UsageError("no token fits the schema; change the schema")
        return mask

    def push(self, token: int) -> bool:
        """Adds a token of the answer; returns whether the answer ends with it.

        Raises:
          UsageError: The schema is too complex.
        """
        self._matcher.consume_token(token)
        if self._matcher.stop_reason() in ("EndOfSentence", "NoExtension", "NoExtensionBias"):
            return True
        self._check()
        return False

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UsageError(f"the schema is not supported: {_line(self._matcher.get_error())}")


class Grammars:
    """Makes grammars for the tokens of one model."""

    def __init__(self, generator: Generator):
        """Does nothing yet: ``prepare`` or the first grammar imports llguidance and loads the vocabulary."""
        self._generator = generator
        self._vocabulary: Any = None
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """Imports llguidance and converts the vocabulary before answers run, because both keep Python's lock.

        Failures are left to the first grammar.
        """
        with contextlib.suppress(UsageError):
            self._load()

    def of_schema(self, schema: Mapping[str, Any]) -> Grammar:
        """Returns a grammar of the JSON texts that fit a schema.

        Args:
          schema: JSON schema. References lead to the schema itself only; nothing is loaded.

        Raises:
          UsageError: The schema is invalid, too large, or uses what llguidance does not support; llguidance
            is not installed or does not support the tokenizer.
        """
        return self.of_rules("start: json", {"json": schema})

    def of_rules(self, rules: str, schemas: Mapping[str, Mapping[str, Any]]) -> Grammar:
        """Returns a grammar of texts that contain JSON.

        Args:
          rules: Rules in llguidance's dialect of Lark. The rule ``start`` is the whole text.
          schemas: JSON schema of each rule that ``rules`` uses and does not define.

        Raises:
          UsageError: As in ``of_schema``.
        """
        llguidance, vocabulary = self._load()
        _check_size(list(schemas.values()))
        try:
            lines = [f"{name}: %json {_spelled(schema)}" for name, schema in schemas.items()]
        except RecursionError:
            raise UsageError("the schema is nested too deeply; make it flatter") from None
        lark = "\n".join([rules, *lines])
        result = Grammar(
            llguidance.LLMatcher(vocabulary, lark, log_level=0),
            -(-self._generator.model.config.vocab_size // 32),
        )
        result._check()
        result.allowed()  # Some schemas fail only here.
        return result

    def _load(self) -> tuple[Any, Any]:
        """Returns llguidance and the vocabulary, which takes a second to convert."""
        try:
            import llguidance
        except ImportError:
            raise UsageError("schemas need llguidance; install it: pip install 'grinqh-jax[serve]'") from None
        with self._lock:
            if self._vocabulary is None:
                generator = self._generator
                try:
                    self._vocabulary = llguidance.LLTokenizer(
                        generator.tokenizer.json_text(),
                        n_vocab=generator.model.config.vocab_size,
                        eos_token=list(generator.defaults.eos_tokens),
                    )
                except ValueError as error:
                    raise UsageError(
                        f"llguidance does not support this model's tokenizer: {_line(str(error))}"
                    ) from None
            return llguidance, self._vocabulary


def _spelled(schema: Mapping[str, Any]) -> str:
    """Returns a schema as JSON, with the spelling of its texts."""
    return json.dumps({**schema, "x-guidance": SPELLING})


def _check_size(schemas: list[Any]) -> None:
    """Raises UsageError if schemas are together too large for llguidance."""
    objects = 0
    references: set[str] = set()
    rest = schemas
    while rest:
        value = rest.pop()
        if isinstance(value, Mapping):
            objects += 1
            references.update(each for each in (value.get("$ref"),) if isinstance(each, str))
            rest += value.values()
        elif isinstance(value, list):
            rest += value
        if objects > MOST_OBJECTS or len(references) > MOST_REFERENCES:
            raise UsageError(
                f"the schema has more than {MOST_OBJECTS} objects or {MOST_REFERENCES} different references; "
                "make it smaller"
            )


def _line(message: str) -> str:
    """Returns the beginning of a message of llguidance on one line, without the rules that it quotes."""
    reason = message.partition("failed to compile JSON schema: ")[2] or message
    return " ".join(reason.partition("<state>")[0].partition("\n   1 | ")[0].split())[:SHOWN_CHARACTERS]
