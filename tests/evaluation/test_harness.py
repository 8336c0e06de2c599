"""The adapter to lm-evaluation-harness on small tasks; its log-likelihoods against ``perplexity``."""

import json
import math

import numpy as np
import pytest
from byte_model import write_companions, write_graded

from grinqh_jax import BUNDLED_MODEL
from grinqh_jax import __main__ as commands
from grinqh_jax.errors import UsageError
from grinqh_jax.evaluation.perplexity import measure

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness (extra: eval) is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # the harness warns

QUESTION = (
    "Hugo has 86 coins and gives 27 of them to Noah. Later Hugo finds 5 more coins near the harbour. "
    "How many coins does Hugo have?"
)
CHOICES = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
TEXTS = """
task: tiny_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}]
"""
SUMS = """
task: tiny_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n\\n", "Question:"], max_gen_toks: 48, do_sample: false}}
filter_list:
  - name: number
    filter: [{{function: regex, regex_pattern: "#### (-?[0-9]+)"}}, {{function: take_first}}]
metric_list: [{{metric: exact_match}}]
"""


def tasks(directory, **records):
    """Writes a YAML and a JSON lines file for each task, and returns a manager that has all of them."""
    from lm_eval.tasks import TaskManager

    for name, (template, lines) in records.items():
        data = directory / f"{name}.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        (directory / f"{name}.yaml").write_text(template.format(data=data))
    return TaskManager(include_path=str(directory), include_defaults=False)


@pytest.fixture(scope="module")
def bundled():
    from grinqh_jax.evaluation.harness import GrinqhLM

    return GrinqhLM(str(BUNDLED_MODEL), bits=4, max_length=128)


@pytest.fixture(scope="module")
def tiny_lm(tiny_directory):
    from grinqh_jax.evaluation.harness import GrinqhLM

    return GrinqhLM(str(tiny_directory), bits=2.5, batch_size=4, max_length=32)


def instance(kind, *arguments):
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0)


def test_rolling_log_likelihood_matches_perplexity(tiny_lm):
    generator = tiny_lm.generator
    text = "the old house stood at the end."
    tokens = np.array([tiny_lm.prefix_token_id, *generator.tokenizer.encode(text)])
    perplexities = []
    for bits in (2.5, "full"):
        (expected,) = measure(generator.model, generator.targets, tokens, [bits], sequence_length=64)
        tiny_lm.bits = bits
        (measured,) = tiny_lm.loglikelihood_rolling([instance("loglikelihood_rolling", text)])
        perplexities.append(math.exp(-measured / expected.tokens))
        assert perplexities[-1] == pytest.approx(expected.perplexity, rel=1e-4)
        (whole,) = tiny_lm.loglikelihood([instance("loglikelihood", "", text)])
        assert whole[0] == pytest.approx(measured, rel=1e-5)
    tiny_lm.bits = 2.5
    assert abs(perplexities[0] - perplexities[1]) > 1e-3, "grading has no effect"


def test_log_likelihoods_add_up_and_greedy_tokens_are_recognised(tiny_lm):
    context, first, second = "ann has 3 cups", " and", " a hat"
    tokens = tiny_lm.tok_encode(context)
    logits = [tiny_lm._score([(tokens, [token])])[0].log_likelihood for token in range(48)]
    greedy_token = int(np.argmax(logits))
    results = tiny_lm.loglikelihood(
        [
            instance("loglikelihood", context, first + second),
            instance("loglikelihood", context, first),
            instance("loglikelihood", context + first, second),
        ]
    )
    whole, begin, end = (score for score, _ in results)
    assert whole == pytest.approx(begin + end, rel=1e-4)
    assert np.logaddexp.reduce(logits) == pytest.approx(0, abs=1e-4)
    for token, greedy in ((greedy_token, True), ((greedy_token + 1) % 48, False)):
        assert tiny_lm._score([(tokens, [token])])[0].greedy is greedy


def test_the_start_of_a_long_request_is_dropped(tiny_lm):
    words = "one two three four five six seven eight nine ten " * 3
    (long,) = tiny_lm.loglikelihood([instance("loglikelihood", words, " cat")])
    tokens = tiny_lm.tok_encode(words + " cat")
    # The harness moves the trailing space of the context to the continuation.
    (score,) = tiny_lm._score([(tokens[-33:-5], tokens[-5:])])
    assert long[0] == pytest.approx(score.log_likelihood, rel=1e-5)
    assert score.tokens == 32
    (rolling,) = tiny_lm.loglikelihood_rolling([instance("loglikelihood_rolling", words)])
    assert rolling < -len(words)  # a random model: more than a nat a letter
    with pytest.raises(UsageError, match="token of the context must fit"):
        tiny_lm._score([([1], [2] * 33)])


def test_log_likelihood_tasks_run_in_the_harness(tiny_lm, tmp_path):
    questions = [
        {"question": "the sun rises in the", "choices": [" east.", " qqq.", " xkcd"], "answer": 0},
        {"question": "he opened the", "choices": ["zzz", " door."], "answer": 1},
    ]
    text = "it was a cold night in the old house."
    manager = tasks(tmp_path, choice=(CHOICES, questions), text=(TEXTS, [{"text": text}]))
    results = lm_eval.simple_evaluate(
        tiny_lm, tasks=["tiny_choice", "tiny_text"], task_manager=manager, bootstrap_iters=0
    )
    right = 0
    for record in questions:
        scores = tiny_lm.loglikelihood(
            [instance("loglikelihood", record["question"], f" {choice}") for choice in record["choices"]]
        )
        right += int(np.argmax([score for score, _ in scores])) == record["answer"]
    assert results["results"]["tiny_choice"]["acc,none"] == right / 2
    (rolling,) = tiny_lm.loglikelihood_rolling([instance("loglikelihood_rolling", text)])
    measured = results["results"]["tiny_text"]["word_perplexity,none"]
    assert measured == pytest.approx(math.exp(-rolling / len(text.split())), rel=1e-5)
    assert results["config"]["bits"] == 2.5
    assert 0 < results["config"]["realised_bits_loglikelihood"] < 4
    assert results["config"]["realised_bits_generation"] is None


def test_a_generation_task_runs_in_the_harness(bundled, tmp_path):
    manager = tasks(tmp_path, sums=(SUMS, [{"question": QUESTION, "answer": "64"}]))
    results = lm_eval.simple_evaluate(bundled, tasks=["tiny_sums"], task_manager=manager, bootstrap_iters=0)
    assert results["results"]["tiny_sums"]["exact_match,number"] == 1
    assert results["config"]["realised_bits_generation"] == pytest.approx(4, abs=0.5)


def test_stop_strings_and_sampling_options_are_honoured(bundled):
    prompt = f"Question: {QUESTION}\nAnswer:"
    plain, cut, sampled, again, other = bundled.generate_until(
        [
            instance("generate_until", prompt, options)
            for options in (
                {"until": ["####"], "max_gen_toks": 40},
                {"until": "64", "max_gen_toks": 40},
                {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 3.0, "seed": 5},
                {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 3.0, "seed": 5, "x": 1},
                {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 3.0, "seed": 6},
            )
        ]
    )
    assert "64" in plain
    assert "####" not in plain
    assert cut == plain.split("64")[0]
    assert sampled == again != other


def test_the_verb_registers_the_model(tiny_directory, tmp_path, capsys, monkeypatch):
    tasks(tmp_path, text=(TEXTS, [{"text": "some text to read. and more"}]))
    monkeypatch.setattr("sys.argv", ["pytest"])
    flags = ["--model", "grinqh", "--include_path", str(tmp_path), "--tasks", "tiny_text"]
    assert commands.main(["lm-eval", *flags, "--model_args", f"pretrained={tiny_directory},bits=2.5"]) == 0
    assert "word_perplexity" in capsys.readouterr().out
    assert commands.main(["lm-eval", *flags, "--model_args", f"pretrained={tiny_directory},bits=9"]) == 2
    assert "error: bits 9" in capsys.readouterr().err


def test_flags_of_the_harness_are_accepted_or_refused_in_one_line(
    graded_directory, tmp_path, capsys, monkeypatch
):
    from grinqh_jax.evaluation.harness import GrinqhLM

    files = tmp_path / "files"
    files.mkdir()
    companions = write_companions(files, chat=False)
    source = "{{ messages[0].content }}"
    named = [{"name": name, "template": name[0] + source} for name in ("default", "tool_use")]
    config = json.loads((files / "tokenizer_config.json").read_text())
    (files / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    model = write_graded(tmp_path / "model", companions)
    tasks(tmp_path, sums=(SUMS.replace("48", "4"), [{"question": "ab", "answer": "1"}]))
    monkeypatch.setattr("sys.argv", ["pytest"])
    seen = []
    encode = GrinqhLM.tok_encode
    monkeypatch.setattr(GrinqhLM, "tok_encode", lambda lm, text: seen.append(text) or encode(lm, text))

    def run(*flags, arguments=""):
        fixed = ["--model", "grinqh", "--include_path", str(tmp_path), "--tasks", "tiny_sums"]
        code = commands.main(["lm-eval", *fixed, "--model_args", f"pretrained={model}{arguments}", *flags])
        return code, capsys.readouterr().err

    assert run("--trust_remote_code")[0] == 0
    assert run(arguments=",dtype=bfloat16")[0] == 0
    assert run("--apply_chat_template", "tool_use")[0] == 0
    assert seen[-1].startswith("tQuestion: ab")
    assert run("--apply_chat_template")[0] == 0
    assert seen[-1].startswith("dQuestion: ab")
    for flags, arguments, message in (
        ((), ",dtype=float16", "error: dtype float16: expected auto, float32, bfloat16"),
        ((), ",parallelize=True", "error: unknown model_args parallelize"),
        (("--apply_chat_template", "rag"), "", "no chat template is named rag"),
    ):
        code, error = run(*flags, arguments=arguments)
        assert code == 2
        assert [line for line in error.splitlines() if message in line]
        assert "Traceback" not in error
