"""Makes the speculation of a model from its setting."""

import json
from typing import Any

import jax
import jax.numpy as jnp

from grinqh_jax.decoding.bits import Bits
from grinqh_jax.decoding.generator import Generator
from grinqh_jax.decoding.speculation.drafter import Drafter
from grinqh_jax.decoding.speculation.lookup import PromptLookup
from grinqh_jax.decoding.speculation.model_drafter import ModelDrafter, SelfDrafter
from grinqh_jax.decoding.speculation.setting import SpeculationSetting
from grinqh_jax.decoding.speculation.speculation import DECODED_DRAFTS, Speculation
from grinqh_jax.decoding.thresholds import StackedThresholds, model_thresholds
from grinqh_jax.errors import UsageError
from grinqh_jax.model.cache import rollback_lacks
from grinqh_jax.model.flat_model import FlatModel


def speculation_of(setting: SpeculationSetting | None, generator: Generator) -> Speculation | None:
    """Returns the speculation that a setting describes, and loads the draft model if there is one.

    Args:
      setting: What drafts; None for no speculation.
      generator: The target.

    Raises:
      UsageError: The target cannot roll back its cache, a model does not support the bits, or the draft model
        has another vocabulary or cannot be cut among the devices of the target.
      CheckpointError, UnsupportedModelError: See ``Generator.load``.
    """
    if setting is None:
        return None
    if (lacking := rollback_lacks(generator.model.config)) is not None:
        raise UsageError(
            f"speculation needs a cache that can be rolled back, and {generator.directory} has {lacking}; "
            "use --speculate off"
        )
    if setting.drafter == "lookup":
        return Speculation(PromptLookup())
    if setting.drafter == "self":
        if generator.targets is None:
            raise UsageError(
                f"{generator.directory} is not quantized and has no fewer bits to draft with; use "
                "--speculate lookup, or convert it first"
            )
        thresholds = _thresholds(generator, setting.bits)
        assert thresholds is not None, "a quantized model has thresholds"
        drafter: Drafter = SelfDrafter(thresholds)
    else:
        assert setting.model is not None, "the setting names the draft model"
        cut = generator.model.partition
        mesh = None if cut is None else cut.mesh
        assert not isinstance(mesh, jax.sharding.AbstractMesh), "a model with weights is on devices"
        draft = Generator.load(setting.model, mesh=mesh)
        drafter = model_drafter(draft, generator, setting.bits)
    return Speculation(drafter, most_drafts=DECODED_DRAFTS)


def model_drafter(draft: Generator, target: Generator, bits: Bits | None) -> ModelDrafter:
    """Returns the drafter of a model.

    Args:
      draft: The draft model, on the devices of the target.
      target: The model that verifies.
      bits: Mean bits of the drafts; None for the default.

    Raises:
      UsageError: The models have different vocabularies, or the draft model lacks the bits.
    """
    config = draft.model.config
    if config.vocab_size != target.model.config.vocab_size or _vocabulary(draft) != _vocabulary(target):
        raise UsageError(
            f"{draft.directory} has another vocabulary than {target.directory}; draft with a model of the "
            "same tokenizer, or with --speculate lookup"
        )
    if (lacking := rollback_lacks(config)) is not None:
        raise UsageError(f"{draft.directory} cannot draft, because it has {lacking}; use another model")
    dtype = jnp.dtype(draft.model.compute_dtype)
    cache_config = draft.model.cache_config
    return ModelDrafter(FlatModel(draft.model), _thresholds(draft, bits), cache_config, dtype)


def _thresholds(generator: Generator, bits: Bits | None) -> StackedThresholds | None:
    """Returns the thresholds ``[P]`` of a model for mean bits; None for an unquantized one."""
    wanted = generator.bits(bits)
    if generator.targets is None or wanted is None:
        return None
    return model_thresholds(generator.model, jnp.array(generator.targets), jnp.float32(wanted))


def _vocabulary(generator: Generator) -> Any:
    """Returns the tokens of a tokenizer."""
    return json.loads(generator.tokenizer.json_text())["model"].get("vocab")
