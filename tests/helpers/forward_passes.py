"""Forward passes of a whole model. One program compiles faster than the operations of an eager call."""

import jax

from grinqh_jax.model.apply import Dense

forward = jax.jit(lambda model, tokens: model(tokens))
"""Returns the logits of a decoder, ``[batch, positions, vocabulary]``."""


class _Recorder(Dense):
    def __init__(self):
        self.inputs = {}

    def product(self, name, linear, x):
        self.inputs[name] = x
        return super().product(name, linear, x)


@jax.jit
def linear_inputs(model, tokens):
    """Returns the inputs of each linear layer of a dense decoder, by its name."""
    recorder = _Recorder()
    model(tokens, recorder)
    return recorder.inputs
