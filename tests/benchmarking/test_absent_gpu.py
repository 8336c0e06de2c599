"""``benchmarks/absent_gpu.py``: what it reads in XLA's dump, and the programs that it takes of the engine."""

import argparse
import sys
from pathlib import Path

import jax
import jaxtyping
import pytest
from jax.sharding import AxisType

from grinqh_jax.benchmarking import random_model
from grinqh_jax.decoding.slots.settings import Settings, sampling_rows
from pallas_kernels.lanes import device

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

# Lines of the chunk with drafts that jax 0.12.0.1 compiles for an H200; most launches are taken out.
SEQUENCE = """\
000: kCommandBuffer [source       | next=030 (1)]
    001: kCopy         [source       | sink        ] kCopy
    029: kCustomKernel [prev=028 (1) | sink        ] input_scatter_fusion_3 grid: [1187, 1, 1]
030: kWhile         [prev=000 (1) | next=000 (1)]
condition:
    031: kCustomKernel [source | sink] loop_compare_fusion grid: [1, 1, 1] threads: [1, 1, 1]
  body:
    000: kCommandBuffer [source | sink]
        032: kCustomKernel [source       | sink         ] loop_add_fusion_2 grid: [1, 1, 1]
        102: kConditional  [prev=038 (1) | next=103 (1) ]
          false_branch:
            049: kCustomCall   [prev=064 (1) | next=066 (1)] kCustomCall
            050: kCustomCall   [prev=065 (1) | next=067 (1)] kCustomCall
          true_branch:
            075: kCustomCall   [prev=092 (1) | next=094 (1)] kCustomCall
        103: kCustomKernel [prev=102 (1) | next=104 (1) ] input_reduce_fusion grid: [368, 1, 1]
000: kCommandBuffer [prev=030 (1) | sink        ]
    123: kCustomKernel [source       | sink        ] loop_dynamic_update_slice_fusion grid: [1, 1, 1]
"""

# The same with --xla_gpu_enable_command_buffer=+WHILE. The condition is not indented.
ONE_BUFFER = """\
000: kCommandBuffer [source | sink]
    001: kCopy         [source       | sink        ] kCopy
    029: kCustomKernel [prev=028 (1) | sink        ] input_scatter_fusion_3 grid: [1187, 1, 1]
    030: kWhile        [prev=029 (1) | next=123 (1)]
condition:
        031: kCustomKernel [source | sink] loop_compare_fusion grid: [1, 1, 1] threads: [1, 1, 1]
      body:
        032: kCustomKernel [source       | sink         ] loop_add_fusion_2 grid: [1, 1, 1]
        102: kConditional  [prev=038 (1) | next=103 (1) ]
          false_branch:
            049: kCustomCall   [prev=064 (1) | next=066 (1)] kCustomCall
            050: kCustomCall   [prev=065 (1) | next=067 (1)] kCustomCall
          true_branch:
            075: kCustomCall   [prev=092 (1) | next=094 (1)] kCustomCall
        103: kCustomKernel [prev=102 (1) | next=104 (1) ] input_reduce_fusion grid: [368, 1, 1]
    123: kCustomKernel [source       | sink        ] loop_dynamic_update_slice_fusion grid: [1, 1, 1]
"""

NAMES = {
    1: "copy.102",
    29: "input_scatter_fusion.3",
    30: "while.78",
    31: "loop_compare_fusion",
    32: "loop_add_fusion.2",
    49: "mpmd_map.327",
    50: "cub-device-radix-sort.1",
    75: "mpmd_map.331",
    102: "cond.8",
    103: "input_reduce_fusion",
    123: "loop_dynamic_update_slice_fusion",
}
METADATA = "".join(
    f'thunk_metadata {{\n  thunk_info {{\n    profile_annotation: "{name}"\n    thunk_id: {number}\n  }} }}\n'
    for number, name in NAMES.items()
)

HLO = f"""\
HloModule jit_speculate, is_scheduled=true

FileNames
1 "{BENCHMARKS.parent}/grinqh_jax/decoding/sampling.py"
2 "/elsewhere/flax/module.py"

FunctionNames
1 "greedy"

FileLocations
4 {{file_name_id=1 function_name_id=1 line=210 end_line=211 column=11 end_column=11}}
5 {{file_name_id=2 function_name_id=1 line=7 end_line=7 column=1 end_column=1}}

StackFrames
8 {{file_location_id=4 parent_frame_id=1}}
9 {{file_location_id=5 parent_frame_id=1}}


ENTRY %main (p: f32[8]) -> f32[8] {{
  %mpmd_map.327 = (bf16[1,8]{{1,0}}, f32[1,16]{{1,0}}) custom-call(%a), custom_call_target="mosaic_gpu_v2", \
api_version=API_VERSION_TYPED_FFI, metadata={{op_name="jit(f)/while/body/norm/add_norm_kernel/mpmd_map" \
stack_frame_id=9}}, backend_config={{module = "ML\\EFR"}}
  %cub-device-radix-sort.1 = f32[8]{{0}} custom-call(%a), custom_call_target="__cub$DeviceRadixSort"
  %mpmd_map.331 = f32[8,1,6144]{{2,1,0}} custom-call(%c), custom_call_target="mosaic_gpu_v2", \
metadata={{op_name="jit(f)/graded_matvec_kernel/mpmd_map" stack_frame_id=9}}
  %input_reduce_fusion = (f32[367]{{0}}, s32[367]{{0}}) fusion(%d), kind=kInput, calls=%fused_reduce, \
metadata={{op_name="jit(f)/while/body/sampling/reduce" stack_frame_id=8}}
  ROOT %loop_dynamic_update_slice_fusion = f32[8]{{0}} fusion(%e), kind=kLoop, metadata={{op_name="scatter" \
stack_frame_id=9}}
}}
"""


@pytest.fixture
def script(monkeypatch):
    for name in ("JAX_PLATFORMS", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "JAX_TRACEBACK_IN_LOCATIONS_LIMIT"):
        monkeypatch.setenv(name, "1" if name != "JAX_PLATFORMS" else "cpu")  # Importing the script sets them.
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import absent_gpu

    return absent_gpu


@pytest.mark.parametrize("sequence", [SEQUENCE, ONE_BUFFER])
def test_places_kinds_and_origins(script, sequence):
    found = script.launches(sequence, METADATA, HLO)
    assert [(launch.place, launch.kind) for launch in found] == [
        ("once", "copies"),
        ("once", "XLA fusions"),
        ("once", "loops and branches"),
        ("condition", "XLA fusions"),
        ("loop", "XLA fusions"),
        ("loop", "loops and branches"),
        ("loop/false_branch", "add_norm"),
        ("loop/false_branch", "library calls"),
        ("loop/true_branch", "graded_matvec"),
        ("loop", "XLA fusions"),
        ("once", "XLA fusions"),
    ]
    origins = [launch.origin for launch in found]
    assert origins[0] == "copy.102"
    assert origins[9] == "input_reduce_fusion (f32[367], s32[367]) reduce grinqh_jax/decoding/sampling.py:210"
    assert origins[10] == "loop_dynamic_update_slice_fusion f32[8] scatter /elsewhere/flax/module.py:7"


@pytest.mark.parametrize(
    ("sequence", "outside", "buffers", "inside"),
    [(SEQUENCE, {"once": 1, "condition": 1}, 3, 9), (ONE_BUFFER, {}, 1, 11)],
)
def test_figures(script, sequence, outside, buffers, inside):
    figures = script.figures(script.launches(sequence, METADATA, HLO))
    assert figures == {
        "once: copies": 1,
        "once: XLA fusions": 2,
        "once: loops and branches": 1,
        "condition: XLA fusions": 1,
        "loop: XLA fusions": 2,
        "loop: loops and branches": 1,
        "loop/false_branch: add_norm": 1,
        "loop/false_branch: library calls": 1,
        "loop/true_branch: graded_matvec": 1,
        **{f"{place}: outside of command buffers": count for place, count in outside.items()},
        "command buffers": buffers,
        "launches in them": inside,
    }


def test_without_the_plugin_it_says_what_to_install(script, monkeypatch):
    monkeypatch.setattr(script.matvec, "version", lambda package: None)
    monkeypatch.setattr(sys, "argv", ["absent_gpu.py"])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == (
        "the CUDA plugin of jax is missing; it needs no GPU: pip install 'grinqh-jax[gpu]'"
    )


@pytest.mark.skipif(jax.__version_info__ < device.OLDEST_JAX, reason="lane programs need jax >= 0.11.2")
@pytest.mark.parametrize(
    ("shape", "program", "labels", "kernel"),
    [
        ("Qwen3-30B-A3B", "chunk", ["chunk, 1 texts, 0 drafts", "chunk, 2 texts, 0 drafts"], "router"),
        ("Qwen3-0.6B", "chunk", ["chunk, 1 texts, 0 drafts", "chunk, 2 texts, 0 drafts"], "graded_matvec"),
        (
            "Qwen3-0.6B",
            "speculative",
            ["speculative, 1 texts, 7 drafts", "speculative, 2 texts, 7 drafts"],
            "prepare_attention",
        ),
        ("Qwen3-0.6B", "prefill", ["prefill, 512 tokens of 512"], "dequantization"),
        ("Qwen3-0.6B", "insert", ["insert"], "sampling"),
        ("Qwen3-0.6B", "free", ["free"], None),
    ],
)
def test_the_programs_are_the_engines(script, monkeypatch, shape, program, labels, kernel):
    """They lower for an H200 from arrays that nobody allocated. Only compilation needs the plugin."""
    monkeypatch.setitem(vars(jaxtyping.config), "jaxtyping_disable", True)  # These arrays are only shapes.
    config = random_model.shape(shape)
    config = script.dataclasses.replace(config, layers=config.layers[:1])
    sampling = sampling_rows(1, config.vocab_size, temperature=0.0)
    settings = Settings.of_request(sampling, 3.0, (), 1, script.STOP_TOKENS)
    gpu = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=gpu)
    args = argparse.Namespace(rows=[1, 2], tokens=[512])
    with jax.sharding.use_abstract_mesh(mesh):
        absent = script.engine_device(config, jax.devices(), settings, 512, program == "speculative")
        found = dict(script.programs(absent, settings, program, args))
        assert list(found) == labels
        for lowering in found.values():
            jitted, arguments = lowering.func.__self__, lowering.args
            lowered = jitted.trace(*arguments, **lowering.keywords).lower(lowering_platforms=("cuda",))
            assert kernel is None or kernel in lowered.as_text()
