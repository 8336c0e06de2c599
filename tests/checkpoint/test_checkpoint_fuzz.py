"""Random corruptions: each gives a clear error or the exact contents, no hang and no bare traceback."""

import os
import random
import shutil

import pytest
from hypothesis_settings import IN_CI
from tiny_checkpoint import QUANTIZATION, assert_same, random_tree, write

from grinqh_jax.checkpoint import load
from grinqh_jax.errors import CheckpointError

TRIES = 200 if IN_CI else 60
GARBAGE = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"manifest"',
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"9" * 10_000,
    b"-1e999999",
    b'{"quantization_config": NaN}',
    b'{"quantization_config": {}}',
    b'{"quantization_config": {"quant_method": "grinqh", "version": 1}}',
    b'{"leaves": {"x": {"shape": [-1], "dtype": "?", "checksum": 3}}, "files": [], "checksum": null}',
    b'{"leaves": {}, "files": {"../../etc/passwd": {"size": -1, "checksum": ""}}, "checksum": "crc32:0"}',
    b'{"\\ud800": "\\udfff"}',
    b"\xff\xfe\x00",
    b"\xef\xbb\xbf{}",
    bytes(range(256)),
]


def truncate(rng, path, files):
    path.write_bytes(path.read_bytes()[: rng.randrange(max(path.stat().st_size, 1))])


def flip(rng, path, files):
    data = bytearray(path.read_bytes() or b"x")
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def erase(rng, path, files):
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data) + 1)
    data[start : start + 64] = bytes(len(data[start : start + 64]))
    path.write_bytes(data)


def append(rng, path, files):
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 100)))


def delete(rng, path, files):
    path.unlink()


def swap(rng, path, files):
    other = rng.choice(files)
    contents = path.read_bytes(), other.read_bytes()
    other.write_bytes(contents[0])
    path.write_bytes(contents[1])


def duplicate(rng, path, files):
    shutil.copy(path, path.with_name("0" + path.name))


def garbage(rng, path, files):
    if rng.random() < 0.7:
        path = rng.choice([file for file in files if file.suffix == ".json" or "METADATA" in file.name])
    path.write_bytes(rng.choice(GARBAGE))


def become_a_directory(rng, path, files):
    path.unlink()
    path.mkdir()


def become_a_pipe(rng, path, files):
    path.unlink()
    os.mkfifo(path)


def become_a_loop(rng, path, files):
    path.unlink()
    path.symlink_to(path.name)


def lose_a_directory(rng, path, files):
    shutil.rmtree(rng.choice([file.parent for file in files if file.parent.parent.name == "state"]))


CORRUPTIONS = [truncate, flip, flip, erase, append, delete, swap, duplicate, garbage, garbage]
RARE = [become_a_directory, become_a_pipe, become_a_loop, lose_a_directory]


@pytest.mark.timeout(60)
def test_corrupted_checkpoints_are_refused_or_read_exactly(tmp_path):
    original = write(tmp_path / "tiny")
    written = random_tree()
    damaged = tmp_path / "damaged"
    refused = {}
    for seed in range(TRIES):
        rng = random.Random(seed)
        shutil.copytree(original, damaged)
        files = sorted(path for path in damaged.rglob("*") if path.is_file())
        corrupt = rng.choice(CORRUPTIONS if rng.random() < 0.9 else RARE)
        corrupt(rng, rng.choice(files), files)
        try:
            loaded = load(damaged)
        except CheckpointError as error:
            refused[f"{corrupt.__name__} (seed {seed})"] = str(error)
        else:
            assert loaded.quantization == QUANTIZATION, f"{corrupt.__name__} (seed {seed})"
            assert_same(loaded.model, written)
        shutil.rmtree(damaged)
    for corruption, message in refused.items():
        assert "\n" not in message, corruption
        assert str(damaged) in message, corruption
    # Some corruptions change nothing (a file exchanged with itself, a stray copy beside the others).
    assert 0.8 * TRIES < len(refused) < TRIES
