"""The kernel alone: a plain JAX model whose weights are read with as many bits as each input deserves.

    python examples/kernel_in_jax.py [--features 512] [--steps 300]

The script trains a small network, quantizes its layers to nested codes, and classifies test points one by one
with ``graded_matvec``, as a decode step does. It needs pallas_kernels, jax and numpy only. Higher thresholds
read fewer bits.
"""

import argparse

import jax
import jax.numpy as jnp

from pallas_kernels import graded_matvec, quantize

CLASSES, INPUTS = 10, 64


def dense(parameters, x):
    """Returns the logits of points ``[n, inputs]``."""
    first, second = parameters
    return jax.nn.relu(x @ first) @ second


def graded(weights, thresholds, x):
    """Returns the logits of one point, and the mean bits read in each layer."""
    first, second = weights
    hidden, bits = graded_matvec(x, first, thresholds)
    logits, more = graded_matvec(jax.nn.relu(hidden), second, thresholds)
    return logits, jnp.stack([bits, more])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--features", type=int, default=512, help="hidden features (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="training steps (default: %(default)s)")
    args = parser.parse_args()

    # Points around ten centres. Inputs differ in size, as the activations of a language model do.
    centre_key, noise_key, label_key, *keys = jax.random.split(jax.random.key(0), 5)
    sizes = jnp.logspace(-1, 1, INPUTS)
    labels = jax.random.randint(label_key, (2000,), 0, CLASSES)
    centres = jax.random.normal(centre_key, (CLASSES, INPUTS))
    points = (centres[labels] + 1.5 * jax.random.normal(noise_key, (2000, INPUTS))) * sizes
    train, test = slice(0, 1500), slice(1500, None)

    def loss(parameters):
        log_p = jax.nn.log_softmax(dense(parameters, points[train]))
        return -jnp.mean(jnp.take_along_axis(log_p, labels[train, None], axis=1))

    @jax.jit
    def step(parameters):
        return jax.tree.map(lambda w, g: w - 0.01 * g, parameters, jax.grad(loss)(parameters))

    shapes = (INPUTS, args.features), (args.features, CLASSES)
    parameters = [jax.random.normal(k, s) / s[0] ** 0.5 / 3 for k, s in zip(keys, shapes, strict=True)]
    for _ in range(args.steps):
        parameters = step(parameters)

    def accuracy(logits):
        return float(jnp.mean(jnp.argmax(logits, axis=-1) == labels[test]))

    print(f"float32: accuracy {accuracy(dense(parameters, points[test])):.3f}")
    weights = [quantize(w) for w in parameters]
    run = jax.jit(lambda thresholds: jax.lax.map(lambda x: graded(weights, thresholds, x), points[test]))
    for scale in (0.0, 0.5, 1.0, 2.0, 4.0):
        logits, bits = run(scale * jnp.array([0.1, 0.5, 1.0, 2.0]))
        read = " and ".join(f"{float(each):.2f}" for each in bits.mean(axis=0))
        print(f"thresholds times {scale:g}: {read} bits, accuracy {accuracy(logits):.3f}")


if __name__ == "__main__":
    main()
