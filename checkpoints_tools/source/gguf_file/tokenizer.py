"""Writes the tokenizer of a GGUF file as Hugging Face files.

A GGUF file has the vocabulary and the merges of a byte-level BPE tokenizer, and the name of its
pre-tokenizer. The name stands for the rule that splits text into words, the normalizer, and the BOS token
before a text.
"""

import dataclasses
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from checkpoints_tools.source.gguf_file.contents import GGUFFile
from grinqh_jax.companions import CHAT_TEMPLATES
from grinqh_jax.errors import CheckpointError, UnsupportedModelError
from grinqh_jax.json_files import write_json

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
"""Token types of GGUF: special, added but not special, and padding of the vocabulary."""

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The regular expression of GPT-4 for words. Llama 3 and Qwen differ from it only in the digits of a word."""


@dataclasses.dataclass(frozen=True)
class _Rule:
    """The steps that the name of a pre-tokenizer stands for.

    Attributes:
      split: The regular expression whose matches are words, or None for GPT-2's words.
      single_digits: Whether digits are split off first.
      nfc: Whether text is normalized to NFC.
      ignore_merges: Whether a word that is a token becomes that token, without the merges.
      add_bos: Whether a text begins with BOS, unless the file says otherwise.
    """

    split: str | None = None
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_LLAMA3 = _Rule(split=_WORDS.format(digits=r"\p{N}{1,3}"), ignore_merges=True, add_bos=True)
PRE_TOKENIZERS = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _Rule(split=_WORDS.format(digits=r"\p{N}"), nfc=True),
    "smollm": _Rule(single_digits=True),
    "gpt-2": _Rule(),
}
"""Supported values of ``tokenizer.ggml.pre``."""

_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>")
"""Special tokens that end an answer in the models of these tokenizers, besides those that the file names."""

_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""Keys of ``general.sampling``, and the keys of ``generation_config.json``."""


def write_tokenizer(file: GGUFFile, directory: Path) -> None:
    """Writes the tokenizer, the chat templates and ``generation_config.json`` of a GGUF file.

    Args:
      file: The GGUF file.
      directory: An existing directory.

    Raises:
      CheckpointError: Parts of the tokenizer are missing or do not fit each other.
      UnsupportedModelError: The tokenizer is not byte-level BPE, or its pre-tokenizer is not supported.
    """
    vocabulary = _Vocabulary.read(file)
    vocabulary.tokenizer().save(str(directory / "tokenizer.json"))
    metadata = file.metadata
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {f"{role}_token": vocabulary.tokens[number] for role, number in vocabulary.roles.items()}
    write_json(directory / "tokenizer_config.json", config | {"clean_up_tokenization_spaces": False})
    if template := metadata.get("tokenizer.chat_template"):
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    for name in metadata.get("tokenizer.chat_templates", []):
        (directory / CHAT_TEMPLATES).mkdir(exist_ok=True)
        if Path(name).name != name:
            raise CheckpointError(f"{file.path}: {name!r} cannot be the name of a chat template")
        path = directory / CHAT_TEMPLATES / f"{name}.jinja"
        path.write_text(metadata[f"tokenizer.chat_template.{name}"], encoding="utf-8")
    generation = {
        key: metadata[f"general.sampling.{name}"]
        for name, key in _SAMPLING.items()
        if f"general.sampling.{name}" in metadata
    }
    if "temperature" in generation:
        generation["do_sample"] = generation["temperature"] > 0
    for role in ("bos", "pad"):
        if role in vocabulary.roles:
            generation[f"{role}_token_id"] = vocabulary.roles[role]
    if ends := vocabulary.ends(metadata):
        generation["eos_token_id"] = ends
    write_json(directory / "generation_config.json", generation)


@dataclasses.dataclass(frozen=True)
class _Vocabulary:
    """Vocabulary and rules of a tokenizer.

    Attributes:
      tokens: Text of each token, in the alphabet of byte-level BPE.
      types: Type of each token.
      merges: Pairs of tokens, in the order of merging.
      roles: Tokens by role: ``bos``, ``eos``, ``pad``, ``unk``.
      rule: Steps that the name of the pre-tokenizer stands for.
      add_bos: Whether a text begins with BOS.
      add_eos: Whether a text ends with EOS.
    """

    tokens: list[str]
    types: list[int]
    merges: list[tuple[str, str]]
    roles: dict[str, int]
    rule: _Rule
    add_bos: bool
    add_eos: bool

    @classmethod
    def read(cls, file: GGUFFile) -> "_Vocabulary":
        """Reads and checks the tokenizer in a file. Raises as ``write_tokenizer`` does."""
        metadata = file.metadata
        model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
        if model != "gpt2":
            raise UnsupportedModelError(
                f"{file.path}: tokenizer {model!r} (supported in GGUF: gpt2, byte-level BPE); use the model's"
                " safetensors"
            )
        if pre not in PRE_TOKENIZERS:
            raise UnsupportedModelError(
                f"{file.path}: pre-tokenizer {pre!r} (supported in GGUF: {', '.join(PRE_TOKENIZERS)}); use"
                " the model's safetensors"
            )
        keys = ("tokens", "token_type", "merges")
        missing = [key for key in keys if not isinstance(metadata.get(f"tokenizer.ggml.{key}"), list)]
        if missing:
            names = ", ".join(f"tokenizer.ggml.{key}" for key in missing)
            raise CheckpointError(f"{file.path}: lacks {names}; download a complete file")
        tokens, types, merges = (metadata[f"tokenizer.ggml.{key}"] for key in keys)
        roles = {}
        for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
            if (number := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
                roles[role] = number
        problems = []
        if len(types) != len(tokens):
            problems.append(f"{len(tokens)} tokens have {len(types)} types")
        if len(set(tokens)) != len(tokens):
            problems.append("two tokens have the same text")
        problems += [f"the {role} token is {n}" for role, n in roles.items() if not 0 <= n < len(tokens)]
        if problems:
            raise CheckpointError(f"{file.path}: {'; '.join(problems)}; download the file again")
        rule = PRE_TOKENIZERS[pre]
        return cls(
            tokens=tokens,
            types=types,
            merges=[tuple(merge.split(" ", 1)) for merge in merges],
            roles=roles,
            rule=rule,
            add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", rule.add_bos)) and "bos" in roles,
            add_eos=bool(metadata.get("tokenizer.ggml.add_eos_token", False)) and "eos" in roles,
        )

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Builds the tokenizer. Raises CheckpointError if a merge names no token."""
        rule = self.rule
        # Added tokens are in the vocabulary, too. Otherwise the library would give them other numbers.
        numbers = {token: i for i, token in enumerate(self.tokens) if self.types[i] != UNUSED}
        try:
            model = models.BPE(numbers, self.merges, ignore_merges=rule.ignore_merges)
        except Exception as error:  # the library raises no narrower type
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"the merges do not fit the tokens of the GGUF file: {reason:.200}"
            ) from None
        result = tokenizers.Tokenizer(model)
        if rule.nfc:
            result.normalizer = normalizers.NFC()
        split: list[Any] = []
        if rule.single_digits:
            split.append(pre_tokenizers.Digits(individual_digits=True))
        if rule.split is not None:
            split.append(pre_tokenizers.Split(Regex(rule.split), "isolated"))
        split.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.split is None))
        result.pre_tokenizer = pre_tokenizers.Sequence(split)
        result.decoder = decoders.ByteLevel()
        if self.add_bos or self.add_eos:
            result.post_processor = self._surrounded()
        special = {i for i, kind in enumerate(self.types) if kind == CONTROL} | set(self.roles.values())
        added = sorted(special | {i for i, kind in enumerate(self.types) if kind == USER_DEFINED})
        result.add_tokens([AddedToken(self.tokens[i], special=i in special, normalized=False) for i in added])
        return result

    def _surrounded(self) -> processors.Sequence:
        """Returns the step that puts BOS before a text and EOS after it."""
        first = self.roles.get("bos") if self.add_bos else None
        last = self.roles.get("eos") if self.add_eos else None
        names = [self.tokens[i] if i is not None else None for i in (first, last)]
        single = " ".join(filter(None, (names[0], "$A", names[1])))
        pair = " ".join(
            filter(None, (names[0], "$A", names[1], names[0] and f"{names[0]}:1", "$B:1", names[1]))
        )
        numbered = [(self.tokens[i], i) for i in {first, last} if i is not None]
        template = processors.TemplateProcessing(single=single, pair=pair, special_tokens=numbered)
        return processors.Sequence([processors.ByteLevel(trim_offsets=False), template])

    def ends(self, metadata) -> list[int]:
        """Returns the tokens that end an answer, first the file's EOS token."""
        named = [metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
        known = [i for i, token in enumerate(self.tokens) if token in _ENDS and self.types[i] == CONTROL]
        return list(dict.fromkeys([number for number in named if number is not None] + known))
