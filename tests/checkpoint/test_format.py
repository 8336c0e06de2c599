"""A reader written from docs/format.md alone agrees with the library's, so the page is complete.

The reader uses json, zlib, numpy and TensorStore. Only the comparisons import this repository.
"""

import functools
import json
import math
import re
import zlib
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorstore
import tiny_checkpoint

from grinqh_jax import BUNDLED_MODEL
from grinqh_jax.checkpoint import load
from grinqh_jax.decoding.thresholds import interpolate
from pallas_kernels import dequantize

FORMAT = Path(__file__).parents[2] / "docs" / "format.md"


class FormatReader:
    """Reads a checkpoint by the rules of docs/format.md."""

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        self.config = json.loads((self.directory / "config.json").read_text())
        self.quantization = self.config["quantization_config"]
        self.manifest = json.loads((self.directory / "manifest.json").read_text())
        self.planes = self.quantization["max_bits"] // 2
        self.leaf = functools.cache(self._read)

    def _read(self, name: str) -> np.ndarray:
        base = f"file://{self.directory.absolute()}/state/"
        store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        return tensorstore.open({"driver": "zarr3", "kvstore": store}).result().read().result()

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        config = self.config
        hidden, intermediate = config["hidden_size"], config["intermediate_size"]
        heads = config["num_attention_heads"]
        head = config.get("head_dim") or hidden // heads
        query, key_value = heads * head, config.get("num_key_value_heads", heads) * head
        shapes = {}
        for i in range(config["num_hidden_layers"]):
            shapes[f"layers.{i}.qkv"] = (hidden, query + 2 * key_value)
            shapes[f"layers.{i}.o"] = (query, hidden)
            shapes[f"layers.{i}.gate_up"] = (hidden, 2 * intermediate)
            shapes[f"layers.{i}.down"] = (intermediate, hidden)
        start = 0
        for b, end in enumerate(self.block_ends()):
            shapes[f"lm_head.blocks.{b}"] = (hidden, end - start)
            start = end
        return shapes

    def block_ends(self) -> list[int]:
        vocab = self.config["vocab_size"]
        return sorted({min(math.ceil(math.ceil(vocab / d) / 512) * 512, vocab) for d in (16, 4, 1)})

    def weight(self, prefix: str, level: int) -> np.ndarray:
        """Returns float64 ``[in, out]``, the weights of a linear layer at a level."""
        features_in, features_out = self.linear_shapes()[prefix]
        planes, scales = self.leaf(f"{prefix}.planes"), self.leaf(f"{prefix}.scales").astype(np.float64)
        stored = stored_outputs(features_out, self.quantization["version"])
        assert planes.shape[2] * 16 == scales.shape[1] == stored
        word, digit = digit_places(np.arange(features_out), stored)
        total = np.zeros((features_in, features_out))
        if level == 0:
            return total
        for f in range(level):
            total += ((planes[f, :features_in][:, word] >> (2 * digit).astype(np.uint32)) & 3) * 4.0**-f
        scale = scales[np.arange(features_in) // 128][:, :features_out]
        gain = float(self.leaf(f"{prefix}.gains")[level - 1])
        return gain * scale * (total + 0.5 * 4.0 ** (1 - level) - 2)

    def thresholds(self, prefix: str, bits: float) -> np.ndarray:
        table, targets = self.leaf(f"{prefix}.thresholds"), self.quantization["targets"]
        bits = min(max(bits, targets[0]), targets[-1])
        i = max(i for i in range(len(targets) - 1) if targets[i] <= bits)
        share = (bits - targets[i]) / (targets[i + 1] - targets[i])
        return (1 - share) * table[i] + share * table[i + 1]


def stored_outputs(out: int, version: int) -> int:
    """Returns ``N``."""
    if version == 1:
        return math.ceil(out / 512) * 512
    pieces = math.ceil(out / 64)
    more = -pieces % 8
    return 64 * (pieces + more) if 16 * more <= pieces else 64 * pieces


def digit_places(n, stored: int):
    """Returns ``(word, digit)`` of outputs ``n`` in rows of ``stored`` outputs."""
    tile, m = n // 512, n % 512
    pieces = np.minimum(8, (stored - 512 * tile) // 64)
    chunk, lane, inner = m // (16 * pieces), m % (16 * pieces) // 4, m % 4
    piece, column = lane // 4, lane % 4
    word = 32 * tile + 4 * piece + 2 * (chunk // 2) + column // 2
    return word, 4 * (2 * (column % 2) + inner % 2) + 2 * (chunk % 2) + inner // 2


def crc32(data: bytes) -> str:
    return f"crc32:{zlib.crc32(data):08x}"


@pytest.fixture(
    scope="module", params=[pytest.param("bundled", marks=pytest.mark.slow), "4 bits, padded", "version 1"]
)
def checkpoint(request, tmp_path_factory):
    if request.param == "bundled":
        return BUNDLED_MODEL
    directory = tmp_path_factory.mktemp("format")
    if request.param == "version 1":
        return tiny_checkpoint.unpack_version_1(directory)
    return tiny_checkpoint.write(directory / "tiny")


@pytest.fixture(scope="module")
def reader(checkpoint):
    return FormatReader(checkpoint)


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load(checkpoint)


def test_weights_at_every_level_equal_the_librarys(reader, loaded):
    for name in reader.linear_shapes():
        for level in range(reader.planes + 1):
            ours = np.asarray(dequantize(loaded.model.linear(name).weight, level, dtype=jnp.float32))
            by_the_page = reader.weight(name, level)
            np.testing.assert_allclose(ours, by_the_page, rtol=2e-6, atol=0, err_msg=f"{name} {level}")


def test_the_other_leaves_equal_the_librarys(reader, loaded):
    model = loaded.model
    np.testing.assert_array_equal(reader.leaf("embed.embedding"), model.embed.embedding[...])
    np.testing.assert_array_equal(reader.leaf("norm.scale"), model.norm.scale[...])
    for i, layer in enumerate(model.layers):
        for norm in ("input_norm", "post_norm", "q_norm", "k_norm"):
            if f"layers.{i}.{norm}.scale" in reader.manifest["leaves"]:
                scale = getattr(layer, norm).scale[...]
                np.testing.assert_array_equal(reader.leaf(f"layers.{i}.{norm}.scale"), scale)
    columns = reader.leaf("lm_head.columns")
    np.testing.assert_array_equal(columns, model.lm_head.token_to_output[...])
    np.testing.assert_array_equal(np.sort(columns), np.arange(reader.config["vocab_size"]))
    assert list(reader.block_ends())[-1] == reader.config["vocab_size"]


def test_thresholds_at_any_bits_equal_the_librarys(reader, loaded):
    targets = reader.quantization["targets"]
    for name in reader.linear_shapes():
        linear = loaded.model.linear(name)
        assert float(linear.max_activation[...]) == reader.leaf(f"{name}.max_activation")
        for bits in (targets[0] - 0.5, targets[0], targets[1], 0.7 * targets[0] + 0.3 * targets[-1], 9.0):
            ours = interpolate(linear.thresholds[...], targets, bits)
            np.testing.assert_allclose(ours, reader.thresholds(name, bits), rtol=1e-5, atol=1e-7)


def test_the_manifest_is_as_described(reader):
    manifest = dict(reader.manifest)
    own = manifest.pop("checksum")
    assert own == crc32(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode())
    for name, entry in manifest["files"].items():
        data = (reader.directory / name).read_bytes()
        assert entry == {"size": len(data), "checksum": crc32(data)}
    dtypes = {}
    for name, entry in manifest["leaves"].items():
        array = reader.leaf(name)
        data = np.ascontiguousarray(array).tobytes()
        assert entry == {"shape": list(array.shape), "dtype": array.dtype.name, "checksum": crc32(data)}
        dtypes.setdefault(name.rpartition(".")[2], set()).add(array.dtype)
    assert dtypes == {
        "embedding": {np.dtype(ml_dtypes.bfloat16)},
        "scale": {np.dtype(ml_dtypes.bfloat16)},
        "columns": {np.dtype(np.int32)},
        "planes": {np.dtype(np.uint32)},
        "scales": {np.dtype(np.float16)},
        "gains": {np.dtype(np.float32)},
        "thresholds": {np.dtype(np.float32)},
        "max_activation": {np.dtype(np.float32)},
    }


def test_the_pages_example_is_true():
    reader = FormatReader(BUNDLED_MODEL)
    page = FORMAT.read_text()
    planes, scales = reader.leaf("layers.0.qkv.planes"), reader.leaf("layers.0.qkv.scales")
    assert scales.shape[1] == 512
    word, digit = digit_places(300, 512)
    assert (word, digit) == (11, 8)
    for f in range(4):
        value = int(planes[f, 133, word])
        assert f"| {f} | `{value:#010x}` | {value >> 2 * digit & 3} |" in page
    assert f"scales[1, 300] = {float(scales[1, 300]):.8g}" in page
    rows = re.findall(r"^\| ([1-4]) \| [2468] \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert len(rows) == 4
    for level, unscaled, gain, weight in rows:
        assert float(gain) == pytest.approx(
            float(reader.leaf("layers.0.qkv.gains")[int(level) - 1]), rel=1e-7
        )
        assert float(weight) == pytest.approx(reader.weight("layers.0.qkv", int(level))[133, 300], rel=1e-7)
        assert float(unscaled) * float(scales[1, 300]) * float(gain) == pytest.approx(float(weight), rel=1e-7)
