"""Model cards: the hub's metadata, the licence of the source, and the measured table."""

import json

import gguf_files
import hf_directories
import pytest
import tiny_checkpoint
import tiny_models
from huggingface_hub import ModelCard

from checkpoints_tools.publish import card, command
from checkpoints_tools.publish.origin import Origin, origin_of
from checkpoints_tools.source.open import open_source
from grinqh_jax.errors import CheckpointError, GrinqhWarning, UsageError
from grinqh_jax.hf import open_checkpoint

FRONT = (
    "---\nlicense: other\nlicense_name: community\nlicense_link: LICENSE\nlanguage: [en, de]\n---\n# Source\n"
)
ROW = {
    "bits": 3.0,
    "realised_bits": 3.04,
    "perplexity": 12.345,
    "stderr": 0.5,
    "kl": 0.0123,
    "same_top1": 0.9,
}


def source_of(directory, front: str | None = None):
    hf_directories.write(directory)
    if front is not None:
        (directory / "README.md").write_text(front)
    return open_checkpoint(directory)


def test_the_licence_is_that_of_the_card_of_the_source(tmp_path):
    origin = origin_of(source_of(tmp_path / "tiny", FRONT), str(tmp_path / "tiny"))
    assert origin == Origin(
        name="tiny",
        license="other",
        license_name="community",
        license_link="LICENSE",
        languages=("en", "de"),
    )


@pytest.mark.parametrize("front", [None, "# No metadata\n", "---\nlicense:\n---\n"])
def test_without_a_licence_the_card_says_unknown(front, tmp_path):
    source = source_of(tmp_path / "tiny", front)
    checkpoint = tiny_checkpoint.write(tmp_path / "model")
    text = card.render(checkpoint, origin_of(source, str(tmp_path / "tiny")))
    assert "Licence of the source: unknown: check it before you publish this checkpoint." in text
    assert ModelCard(text).data.license == "unknown"


def test_a_damaged_card_is_named_and_not_used(tmp_path):
    source = source_of(tmp_path / "tiny", "---\nlicense: [\n---\n")
    with pytest.warns(GrinqhWarning, match=r"README.md: the metadata cannot be read"):
        assert origin_of(source, str(tmp_path / "tiny")).license == "unknown"


def test_a_hub_id_is_the_base_model(tmp_path):
    source = source_of(tmp_path / "snapshots", FRONT)
    checkpoint = tiny_checkpoint.write(tmp_path / "model")
    data = ModelCard(card.render(checkpoint, origin_of(source, "owner/tiny"))).data
    assert data.base_model == "owner/tiny"
    assert data.base_model_relation == "quantized"
    assert (data.license, data.license_name, data.language) == ("other", "community", ["en", "de"])


def test_a_gguf_file_states_its_licence_and_origin(tmp_path):
    metadata = {"general.source.repo_url": "https://huggingface.co/owner/tiny", "general.languages": ["en"]}
    state = hf_directories.random_state(hf_directories.QWEN3)
    path = gguf_files.write(
        tmp_path / "tiny.F32.gguf",
        hf_directories.QWEN3,
        state,
        tokenizer=tiny_models.tokenizer_with_merges(),
        metadata=metadata,
    )
    assert origin_of(open_source(path), str(path)) == Origin(
        name="tiny.F32", hub_id="owner/tiny", license="apache-2.0", languages=("en",)
    )


def test_results_replace_the_measured_table(tmp_path):
    checkpoint = tiny_checkpoint.write(tmp_path / "model")
    results = tmp_path / "books.jsonl"
    results.write_text(
        json.dumps(ROW | {"tokens": 4095}) + "\n" + json.dumps(ROW | {"bits": "full", "tokens": 4095})
    )
    for _ in range(2):
        assert command.main(["--model", str(checkpoint), "--results", str(results)]) == 0
        text = (checkpoint / "README.md").read_text()
        assert text.count("| books | 3.0 | 3.04 | 12.35 ± 0.50 | 0.0123 | 90.0 % |") == 1
        assert text.count("| books | full |") == 1
        assert "Not measured" not in text
        assert "books: 4,095 tokens" in text


def test_a_card_without_a_place_for_results_is_left_alone(tmp_path):
    checkpoint = tiny_checkpoint.write(tmp_path / "model")
    (checkpoint / "README.md").write_text("mine")
    with pytest.raises(UsageError, match="put <!-- quality -->"):
        card.write_results(checkpoint, {"books": [ROW | {"tokens": 5}]})
    assert (checkpoint / "README.md").read_text() == "mine"


@pytest.mark.parametrize("line", ["{}", '{"bits": 3}', "[]"])
def test_other_files_are_no_results(line, tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(line)
    with pytest.raises(UsageError, match="line 1: expected a JSON object with the fields of"):
        card.read_results(path)


def test_only_a_checkpoint_is_published(tmp_path):
    with pytest.raises(CheckpointError, match="is not a GRINQH checkpoint; convert the model first"):
        card.check_checkpoint(hf_directories.write(tmp_path / "tiny"))
