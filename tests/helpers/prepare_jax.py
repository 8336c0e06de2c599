"""Importing this module prepares JAX for tests and installs the run-time checks of shapes and dtypes."""

import os
import sys
import threading

import jax
import jaxtyping
import numpy as np
from jax._src import compiler
from jax._src.interpreters import mlir

if not hasattr(mlir, "_create_ir_context"):
    # jax 0.10 and 0.11 create a context of MLIR for each program, which takes half of the time of a small
    # one. Later releases lower ten programs of a thread in one context.
    _create_context = mlir.make_ir_context
    _contexts = threading.local()

    def _reused_context():
        if not getattr(_contexts, "uses_left", 0):
            _contexts.context, _contexts.uses_left = _create_context(), 10
        _contexts.uses_left -= 1
        return _contexts.context

    mlir.make_ir_context = _reused_context

_flags = os.environ.get("XLA_FLAGS", "")
if "xla_cpu" in _flags:  # CI sets no flags and gets all optimizations; a GPU gets them, too.
    # Optimized programs are compiled with the newer emitters in any case. A lower level of LLVM compiles them
    # in three quarters of the time, and they run as fast.
    _overrides = {"xla_backend_optimization_level": 1}
    if "xla_cpu_use_fusion_emitters=false" in _flags:
        _overrides["xla_cpu_use_fusion_emitters"] = True
    _compile_options = compiler.get_compile_options

    def _compile_options_for_optimized_programs(*args, **options):
        if not jax.config.read("jax_disable_most_optimizations"):
            options["env_options_overrides"] = _overrides | (options.get("env_options_overrides") or {})
        return _compile_options(*args, **options)

    compiler.get_compile_options = _compile_options_for_optimized_programs

# The hook below checks annotations, with jaxtyping's shapes and dtypes, at every call. It precedes the
# imports of the packages. A parameter that is annotated as an array takes a NumPy array too.
jaxtyping.Array = jax.Array | np.ndarray

# `tree_map` may put shapes, shardings or other objects into the fields of a pytree. With this mark jaxtyping
# does not check the constructor of a registered class; it still checks the methods.
_register_dataclass = jax.tree_util.register_dataclass


def _register_with_free_fields(cls, *args, **kwargs):
    cls.__no_type_check__ = True
    return _register_dataclass(cls, *args, **kwargs)


jax.tree_util.register_dataclass = _register_with_free_fields

# The hook would check a function within a function, too. Preparing its checks takes a millisecond at each
# call of the outer function.
_jaxtyped = jaxtyping.jaxtyped


def _check_unless_inner(*, typechecker):
    check = _jaxtyped(typechecker=typechecker)
    return lambda definition: definition if "<locals>" in definition.__qualname__ else check(definition)


jaxtyping.jaxtyped = _check_unless_inner

# pytest imports the conftest.py of each directory on its command line before `tests/conftest.py` imports this
# module. What they import at their top would not be checked in this run.
_early = sorted(sys.modules.keys() & {"checkpoints_tools", "grinqh_jax", "pallas_kernels"})
assert not _early, (
    f"{_early} were imported before the hook of run-time checks: import them in a fixture instead"
)

# Not listed: lane programs and command lines, which have no arrays; checkpoint.quantization and model.config,
# which validate the values of files themselves; hf, which accepts any object with a reader's methods.
jaxtyping.install_import_hook(
    [
        "checkpoints_tools.baselines",
        "checkpoints_tools.calibration",
        "checkpoints_tools.convert",
        "checkpoints_tools.quantizers",
        "checkpoints_tools.source.head",
        "checkpoints_tools.source.layer",
        "grinqh_jax.benchmarking.measure",
        "grinqh_jax.benchmarking.random_model",
        "grinqh_jax.checkpoint.checksums",
        "grinqh_jax.checkpoint.manifest",
        "grinqh_jax.checkpoint.parts",
        "grinqh_jax.checkpoint.reader",
        "grinqh_jax.checkpoint.writer",
        "grinqh_jax.decoding.batching",
        "grinqh_jax.decoding.dial",
        "grinqh_jax.decoding.engine",
        "grinqh_jax.decoding.generation",
        "grinqh_jax.decoding.generator",
        "grinqh_jax.decoding.paged_cache",
        "grinqh_jax.decoding.prefill_buckets",
        "grinqh_jax.decoding.programs",
        "grinqh_jax.decoding.prompt_cache",
        "grinqh_jax.decoding.sampling",
        "grinqh_jax.decoding.slots",
        "grinqh_jax.decoding.statistics",
        "grinqh_jax.decoding.texts",
        "grinqh_jax.decoding.thresholds",
        "grinqh_jax.evaluation",
        "grinqh_jax.json_files",
        "grinqh_jax.model.apply",
        "grinqh_jax.model.attention",
        "grinqh_jax.model.cache",
        "grinqh_jax.model.decoder",
        "grinqh_jax.model.decoder_layer",
        "grinqh_jax.model.delta_net",
        "grinqh_jax.model.experts",
        "grinqh_jax.model.flat_model",
        "grinqh_jax.model.logit_transform",
        "grinqh_jax.model.linear",
        "grinqh_jax.model.partition",
        "grinqh_jax.model.norm",
        "grinqh_jax.model.output_projection",
        "grinqh_jax.model.rope",
        "grinqh_jax.model.stacks",
        "grinqh_jax.model.gated_mlp",
        "grinqh_jax.model.parameters",
        "grinqh_jax.serving",
        "grinqh_jax.sharding.rules",
        "pallas_kernels.activations",
        "pallas_kernels.codes",
        "pallas_kernels.expert_weights",
        "pallas_kernels.experts",
        "pallas_kernels.decode_attention.kernel",
        "pallas_kernels.decode_rows.kernel",
        "pallas_kernels.dequantization.kernel",
        "pallas_kernels.grading",
        "pallas_kernels.matvec.api",
        "pallas_kernels.matvec.mosaic_gpu.kernel",
        "pallas_kernels.matvec.reference",
        "pallas_kernels.matvec.xla",
        "pallas_kernels.selection",
        "pallas_kernels.weight",
    ],
    # As in PEP 484, a parameter that is annotated as float takes an int.
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)
