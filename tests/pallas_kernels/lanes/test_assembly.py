"""Lane programs assemble for the architectures that nobody has run, with few spills."""

import dataclasses
import re

import cuda_source
import instruction_programs
import jax
import pytest
from jax.sharding import AxisType

from pallas_kernels import Activations, NestedWeight
from pallas_kernels.decode_attention import kernel as attention
from pallas_kernels.decode_attention.lane_context import THREADS, Refs, Shape
from pallas_kernels.decode_attention.new_tokens import PREPARE_THREADS, prepare_program
from pallas_kernels.decode_attention.program import attention_program, several_tokens_program
from pallas_kernels.lanes import device
from pallas_kernels.matmul.mosaic_gpu.geometry import THREADS as MATMUL_THREADS
from pallas_kernels.matmul.mosaic_gpu.geometry import Geometry
from pallas_kernels.matmul.mosaic_gpu.lane_context import Refs as MatmulRefs
from pallas_kernels.matmul.mosaic_gpu.program import level_matmul_program
from pallas_kernels.matvec.mosaic_gpu import kernel as matvec
from pallas_kernels.sampling import candidates as sampling
from pallas_kernels.sampling import scoring, selection

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(cuda_source.NVCC is None, reason="needs nvcc"),
    pytest.mark.skipif(jax.__version_info__ < device.OLDEST_JAX, reason="needs jax >= 0.11.2"),
]

GPUS = {
    "sm_89": ("NVIDIA GeForce RTX 4090", 128),
    "sm_90a": ("NVIDIA H200", 132),
    "sm_100a": ("NVIDIA B200", 148),
    "sm_120a": ("NVIDIA GeForce RTX 5090", 170),
}
every_architecture = pytest.mark.parametrize("architecture", GPUS)

MOST_SPILLED_BYTES = 512


def spilled(report: str) -> int:
    return sum(int(count) for count in re.findall(r"(\d+) bytes spill stores", report))


def assemble_matvec(monkeypatch, tmp_path, architecture, rows) -> str:
    """Assembles the matvec of 4096x4096 in the configuration of the GPU."""
    weight = NestedWeight.abstract(4096, 4096)
    x = jax.eval_shape(Activations.of, jax.ShapeDtypeStruct((rows, 4096), "bfloat16"))
    kind, multiprocessors = GPUS[architecture]
    gpu = jax.sharding.AbstractDevice(device_kind=kind, num_cores=multiprocessors, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=gpu)
    with jax.sharding.use_abstract_mesh(mesh):
        geometry = matvec.geometry_of(x, weight)
    names = [field.name for field in dataclasses.fields(matvec.Refs) if field.name != "shared"]

    def program(isa, refs):
        fields = dict(zip((*names, "shared"), refs, strict=True))
        matvec.run_program(isa, geometry, matvec.Refs(**fields))

    return cuda_source.assemble(
        monkeypatch, tmp_path, program, [*names, None], geometry.threads, architecture
    )


@every_architecture
@pytest.mark.parametrize("rows", [1, 4, 8, 16])
def test_matvec(monkeypatch, tmp_path, architecture, rows):
    """The programs of one row, of pairs of bytes and without lists."""
    report = assemble_matvec(monkeypatch, tmp_path, architecture, rows)
    assert spilled(report) <= MOST_SPILLED_BYTES


@every_architecture
@pytest.mark.parametrize(
    ("head_dim", "tokens", "queries_per_kv", "options"),
    [
        (64, 16, 8, {}),
        (80, 4, 4, {"window": 100, "soft_cap": 20.0}),
        (128, 1, 4, {}),
        (128, 8, 4, {}),
        (256, 1, 8, {"window": 100}),
        (256, 8, 2, {}),
    ],
)
@pytest.mark.parametrize("paged", [False, True])
def test_attention(monkeypatch, tmp_path, architecture, head_dim, tokens, queries_per_kv, options, paged):
    kv_heads = 8
    sizes = ((64, 64, kv_heads, head_dim), (2, 32)) if paged else ((2, 2048, kv_heads, head_dim), None)
    shape = Shape(
        batch=2,
        kv_heads=kv_heads,
        queries_per_kv=queries_per_kv,
        head_dim=head_dim,
        tokens=tokens,
        eps=1e-6,
        num_partials=8,
        stored_features=(queries_per_kv + 2) * kv_heads * head_dim,
        **options,
        **attention.cache_sizes(*sizes),
    )
    cache = ("lengths", "keys", "values", *(("pages",) if paged else ()))
    launches = [(attention_program, attention.HEAD_INPUTS, attention.PARTIAL_RESULTS, THREADS)]
    if tokens > 1:
        launches = [
            (prepare_program, attention.HEAD_INPUTS, attention.PREPARED, PREPARE_THREADS),
            (several_tokens_program, attention.PREPARED, attention.PARTIAL_RESULTS, THREADS),
        ]
    for program, inputs, outputs, threads in launches:
        names = (*inputs, *cache, *outputs)

        def run(isa, refs, program=program, names=names):
            program(isa, shape, Refs(**dict(zip((*names, "shared"), refs, strict=True))))

        report = cuda_source.assemble(monkeypatch, tmp_path, run, [*names, None], threads, architecture)
        assert spilled(report) <= MOST_SPILLED_BYTES


@every_architecture
@pytest.mark.parametrize("additions", [False, True])
def test_sampling(monkeypatch, tmp_path, architecture, additions):
    options = dict.fromkeys(("reordered", "biased", "masked", "penalized"), additions)
    shape = sampling.Shape(rows=1, vocabulary=151_936, **options)
    inputs = sampling.Inputs.names(shape)

    def score(isa, refs):
        *arrays, keys, statistics, shared = refs
        refs = scoring.Refs(sampling.Inputs.of(shape, arrays), keys, statistics, shared)
        scoring.scoring_program(isa, shape, refs)

    def select(isa, refs):
        *arrays, keys, statistics, chosen, shared = refs
        refs = selection.Refs(sampling.Inputs.of(shape, arrays), keys, statistics, chosen, shared)
        selection.selection_program(isa, shape, refs)

    launches = [
        (score, ["keys", "statistics"], sampling.SCORING_THREADS),
        (select, ["keys", "statistics", "chosen"], selection.THREADS),
    ]
    for program, arrays, threads in launches:
        names = [*inputs, *arrays, None]
        report = cuda_source.assemble(monkeypatch, tmp_path, program, names, threads, architecture)
        assert spilled(report) <= MOST_SPILLED_BYTES


@pytest.mark.parametrize(
    ("rows", "level", "rounded"),
    [
        *((rows, level, False) for rows, level in ((16, 3), (32, 1), (64, 3), (64, 4))),
        *((rows, level, True) for rows, level in ((64, 2), (128, 3), (128, 4))),
    ],
)
def test_level_matmul(monkeypatch, tmp_path, rows, level, rounded):
    """Nothing is spilled, and the matrix unit multiplies while the next operands are prepared.

    Only compute capability 9.0 has wgmma.
    """
    g = Geometry(
        stored_k=4096,
        stored_n=6144,
        level=level,
        rows=rows,
        multiprocessors=132,
        shared_limit=227 * 1024,
        rounded=rounded,
    )

    def run(isa, refs):
        level_matmul_program(isa, g, MatmulRefs(*refs))

    names = ["x", "planes", "scales", "partials", None]
    report = cuda_source.assemble(monkeypatch, tmp_path, run, names, MATMUL_THREADS, "sm_90a")
    assert spilled(report) == 0
    assert "wgmma.mma_async instructions are serialized" not in report


@every_architecture
@pytest.mark.parametrize("name", instruction_programs.PROGRAMS)
def test_instructions(monkeypatch, tmp_path, architecture, name):
    if name in instruction_programs.NEED_9_0 and architecture == "sm_89":
        pytest.skip("needs compute capability 9.0")
    if name in instruction_programs.ONLY_9_0 and architecture != "sm_90a":
        pytest.skip("only compute capability 9.0 has wgmma")

    def program(isa, refs):
        instruction_programs.run(isa, instruction_programs.PROGRAMS[name], *refs)

    threads = instruction_programs.THREADS
    cuda_source.assemble(monkeypatch, tmp_path, program, ["source", "target", None], threads, architecture)
