"""The tokenizer equals transformers' over a grid of the files that transformers reads."""

import json

import pytest
from marks import slow
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from grinqh_jax.errors import GrinqhError, UsageError
from grinqh_jax.text import tokenizer as tokenizer_module
from grinqh_jax.text.tokenizer import Tokenizer as GrinqhTokenizer

transformers = pytest.importorskip("transformers")

EOS, TURN, END, NOTE = "<eos>", "<|turn|>", "<|end|>", "<note>"
TEXTS = [
    "",
    "the cat sat on 17 mats",
    f"  {TURN}user\n the  Cat {END} <eos>x {NOTE} y<pad>",
    "Grüße, e\u0301 日本 🎉" + " long" * 40,
]
MESSAGES = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": f"sat {END}"}]


def byte_level() -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, "th", "the", "Ġc", "Ġcat", "at"])}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "c"), ("a", "t"), ("Ġc", "at")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS])
    return tokenizer


def byte_fallback() -> Tokenizer:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *"▁abcdefghijklmnopqrstuvwxyz."]
    pieces += ["th", "the", "▁c"]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            [("t", "h"), ("th", "e"), ("▁", "c")],
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", EOS])
    return tokenizer


def qwen() -> Tokenizer:
    """A tokenizer with the pipeline that transformers builds for Qwen2 and Qwen3."""
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


BASES = {"byte_level": byte_level, "byte_fallback": byte_fallback, "qwen": qwen}


def flags(content: str, **changed: bool) -> dict:
    plain = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": content, **plain, "special": True, **changed}


def declared(tokenizer: Tokenizer, *more: dict) -> dict:
    """Returns an added_tokens_decoder with the tokens of the tokenizer, and more with the next ids."""
    known = tokenizer.get_added_tokens_decoder()
    entries = {
        str(number): flags(t.content, special=t.special, normalized=t.normalized)
        for number, t in known.items()
    }
    size = tokenizer.get_vocab_size()
    return entries | {str(size + i): token for i, token in enumerate(more)}


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|turn|>{{ m.role }} {{ m.content }}{% endfor %}|{{ eos_token }}"
)

# Each entry: (name, function that edits the tokenizer, and returns the contents of the files beside it)
FILES = {
    "nothing": lambda t: {},
    "config": lambda t: {"tokenizer_config": {"eos_token": EOS, "model_max_length": 64}},
    "declared": lambda t: {"tokenizer_config": {"eos_token": EOS, "added_tokens_decoder": declared(t)}},
    "declared_more": lambda t: {
        "tokenizer_config": {
            "added_tokens_decoder": declared(
                t, flags(TURN), flags(END, special=False), flags(NOTE, lstrip=True, rstrip=True)
            ),
            "eos_token": TURN,
        }
    },
    "declared_flags": lambda t: {
        "tokenizer_config": {
            "added_tokens_decoder": {k: v | {"lstrip": v["content"] == EOS} for k, v in declared(t).items()}
        }
    },
    "named_tokens": lambda t: {
        "tokenizer_config": {"eos_token": flags(TURN) | {"__type": "AddedToken"}, "pad_token": "<pad>"}
    },
    "additional": lambda t: {"tokenizer_config": {"additional_special_tokens": [TURN, END]}},
    "extra_dict": lambda t: {"tokenizer_config": {"extra_special_tokens": {"turn_token": TURN}}},
    "special_tokens_map": lambda t: {
        "special_tokens_map": {"eos_token": flags(END), "additional_special_tokens": [TURN, NOTE]}
    },
    "added_tokens": lambda t: {"added_tokens": {TURN: t.get_vocab_size(), "the": t.get_vocab_size() + 1}},
    "added_tokens_and_map": lambda t: {
        "added_tokens": {TURN: t.get_vocab_size(), END: t.get_vocab_size() + 1},
        "special_tokens_map": {"eos_token": END},
    },
    "split_special": lambda t: {"tokenizer_config": {"split_special_tokens": True}},
    "add_bos": lambda t: {"tokenizer_config": {"add_bos_token": True, "bos_token": EOS}},
    "prefix_space": lambda t: {"tokenizer_config": {"add_prefix_space": True}},
    "truncation": lambda t: t.enable_truncation(8) or {},
    "padding": lambda t: t.enable_padding(length=100, pad_token=EOS) or {},
    "not_special": lambda t: t.add_tokens([AddedToken(TURN), AddedToken(NOTE, normalized=False)]) and {},
    "not_special_but_named": lambda t: (
        t.add_tokens([AddedToken(TURN)]) and {"tokenizer_config": {"eos_token": TURN}}
    ),
    "template": lambda t: {"tokenizer_config": {"chat_template": TEMPLATE, "eos_token": EOS}},
    "templates": lambda t: {
        "tokenizer_config": {
            "chat_template": [
                {"name": "default", "template": TEMPLATE},
                {"name": "tool_use", "template": "T" + TEMPLATE},
            ]
        }
    },
    "no_default_template": lambda t: {
        "tokenizer_config": {"chat_template": [{"name": "tool_use", "template": "T" + TEMPLATE}]}
    },
    "template_file": lambda t: {
        "tokenizer_config": {"chat_template": "never"},
        "chat_template.jinja": "F" + TEMPLATE,
    },
    "template_folder": lambda t: {
        "chat_template.jinja": "F" + TEMPLATE,
        "additional_chat_templates/rag.jinja": "R" + TEMPLATE,
    },
}
CLASSES = (
    None,
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "Qwen2Tokenizer",
    "Qwen2TokenizerFast",
)


def write(directory, base: str, variant: str, model_type: str, tokenizer_class: str | None):
    directory.mkdir(parents=True)
    tokenizer = BASES[base]()
    files = FILES[variant](tokenizer)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    if tokenizer_class is not None:
        files = files | {
            "tokenizer_config": {"tokenizer_class": tokenizer_class} | files.get("tokenizer_config", {})
        }
    for name, content in files.items():
        path = directory / (name if name.endswith(".jinja") else f"{name}.json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


def theirs(directory):
    """Returns tokens, texts and the chat of transformers, or the name of the step that fails."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception:
        return "cannot load"
    encoded = [tokenizer.encode(t, add_special_tokens=special) for t in TEXTS for special in (True, False)]
    decoded = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in encoded]
    try:
        chat = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
        text = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    except Exception:
        chat = text = "no chat"
    return encoded, decoded, text, chat


def ours(directory):
    try:
        tokenizer = GrinqhTokenizer.load(directory)
    except GrinqhError:
        return "cannot load"
    encoded = [tokenizer.encode(t, special_tokens=special) for t in TEXTS for special in (True, False)]
    decoded = [tokenizer.decode(tokens) for tokens in encoded]
    try:
        chat, text = tokenizer.chat(MESSAGES), tokenizer.chat_text(MESSAGES)
    except GrinqhError:
        chat = text = "no chat"
    return encoded, decoded, text, chat


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", FILES)
@pytest.mark.parametrize("model_type", ["qwen3", *slow("llama")])
def test_every_file_that_transformers_reads_counts(tmp_path, base, variant, model_type):
    for tokenizer_class in CLASSES:
        directory = write(tmp_path / f"{tokenizer_class}", base, variant, model_type, tokenizer_class)
        assert ours(directory) == theirs(directory), tokenizer_class


FAST = [
    ("byte_level", "config", "qwen3", "PreTrainedTokenizerFast"),
    ("byte_level", "truncation", "llama", "LlamaTokenizerFast"),
    ("byte_fallback", "declared", "llama", "TokenizersBackend"),
    ("byte_level", "nothing", "llama", None),
    ("qwen", "declared", "qwen3", "Qwen2Tokenizer"),
    ("qwen", "nothing", "qwen3", None),
]


@pytest.mark.parametrize("case", FAST, ids=str)
def test_transformers_is_not_imported_where_tokenizer_json_says_everything(tmp_path, monkeypatch, case):
    def load(directory):
        raise AssertionError("imports transformers")

    monkeypatch.setattr(tokenizer_module, "_load_transformers", load)
    GrinqhTokenizer.load(write(tmp_path / "model", *case))


def test_a_chat_template_is_chosen_by_name(tmp_path):
    tokenizer = GrinqhTokenizer.load(write(tmp_path / "several", "byte_level", "templates", "qwen3", None))
    default, tool_use = tokenizer.chat_text(MESSAGES), tokenizer.chat_text(MESSAGES, template="tool_use")
    assert tool_use == "T" + default
    assert tokenizer.chat_text(MESSAGES, template="default") == default
    assert tokenizer.chat_template("tool_use") == "T" + tokenizer.chat_template()
    with pytest.raises(UsageError, match=r"no chat template is named rag \(there are: default, tool_use\)"):
        tokenizer.chat_text(MESSAGES, template="rag")
    single = GrinqhTokenizer.load(write(tmp_path / "single", "byte_level", "template", "qwen3", None))
    with pytest.raises(UsageError, match=r"no chat template is named tool_use \(there are: default\)"):
        single.chat_template("tool_use")
