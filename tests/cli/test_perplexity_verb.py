"""The verb ``perplexity``: the reference that it compares with, and bits that a model lacks."""

import dataclasses
import json
import shutil

from command_lines import assert_refused, run

from grinqh_jax.cli import perplexity, reference
from grinqh_jax.decoding.model_files import ModelFiles


def test_settings_that_a_model_lacks_are_named_once(capsys, tmp_path, dense_directory):
    data = tmp_path / "data.txt"
    data.write_text("some text")
    flags = ("--model", dense_directory, "--data", data, "--bits", "2,3")
    result = run(capsys, perplexity.main, *flags)
    assert_refused(result, "bits 2, 3: ", "not quantized")
    assert result.err.count("not quantized") == 1


def test_perplexity_says_what_it_compares_with(capsys, tmp_path, graded_directory, dense_directory):
    data = tmp_path / "data.txt"
    data.write_text("some text to read")
    flags = ("--model", graded_directory, "--data", data, "--bits", "2,full", "--sequence-length", 16)
    result = run(capsys, perplexity.main, *flags)
    assert result.code == 0
    first, titles, *rows = result.out.splitlines()
    assert first.startswith(
        "compared with this checkpoint's own 8 bits, so errors of those bits do not show: "
    )
    assert first.endswith("name it with --reference DIR_OR_HUB_ID")
    assert titles.split()[0] == "bits"
    assert rows[1].split()[3:5] == ["1.0000", "0.00000"]  # ratio and KL of one window with itself
    result = run(capsys, perplexity.main, *flags, "--reference", dense_directory, "--json")
    results = [json.loads(line) for line in result.out.splitlines()]
    assert [fields["reference"] for fields in results] == [str(dense_directory)] * 2
    assert results[1]["kl"] > 0


def test_the_original_is_the_reference_while_it_exists(tmp_path, graded_directory, dense_directory):
    files = ModelFiles.open(graded_directory)

    def found(source, named=None):
        quantization = dataclasses.replace(files.quantization, provenance={"source": source})
        return reference.find_reference(dataclasses.replace(files, quantization=quantization), named)

    original = found(str(dense_directory))
    assert original.files.directory == dense_directory
    assert original.description.startswith(f"the original, {dense_directory}")
    assert found(str(dense_directory), named="self").files is None
    other = tmp_path / "other"
    shutil.copytree(dense_directory, other)
    config = json.loads((other / "config.json").read_text())
    one_layer = {"num_hidden_layers": 1, "layer_types": config["layer_types"][:1]}
    (other / "config.json").write_text(json.dumps(config | one_layer))
    for source, reason in (
        (str(tmp_path / "gone"), "the original is no longer at"),
        (str(other), "holds another model now"),
        (str(tmp_path), "the original cannot be read"),
        (None, "config.json does not say where the original is"),
    ):
        fallback = found(source)
        assert (fallback.files, fallback.name) == (None, "self")
        assert reason in fallback.description
    assert found(None, named=str(dense_directory)).files.directory == dense_directory
