"""Every quantiser in a tiny form, and what their tests share."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni_tokenizers.quantizers import (
    FSQConfig,
    IBQConfig,
    LearnedQuantizerConfig,
    LFQConfig,
    ResidualQuantizerConfig,
    SimVQConfig,
    SplitQuantizerConfig,
    VectorQuantizerConfig,
    make_quantizer,
)
from omni_tokenizers.weights import flatten

EMA = VectorQuantizerConfig(codebook_size=8, dim=4)
LEARNED = LearnedQuantizerConfig(codebook_size=8, dim=4)
DAC = LearnedQuantizerConfig(codebook_size=8, dim=4, code_dim=2, normalize="search")
LLAMAGEN = LearnedQuantizerConfig(codebook_size=8, dim=4, normalize="always")
SIMVQ = SimVQConfig(codebook_size=8, dim=4)
IBQ = IBQConfig(codebook_size=8, dim=4)

SINGLE = {
    "ema": EMA,
    "learned": LEARNED,
    "dac": DAC,
    "llamagen": LLAMAGEN,
    "simvq": SIMVQ,
    "ibq": IBQ,
    "fsq": FSQConfig(levels=(2, 3, 5, 8)),
    "lfq": LFQConfig(bits=4, temperature=0.5),
    "rotation": VectorQuantizerConfig(codebook_size=8, dim=4, gradient="rotation"),
}
LEVELLED = {
    "residual": ResidualQuantizerConfig(3, EMA),
    "residual learned": ResidualQuantizerConfig(3, LEARNED),
    "residual dac": ResidualQuantizerConfig(3, DAC),
    "residual simvq": ResidualQuantizerConfig(3, SIMVQ),
    "residual ibq": ResidualQuantizerConfig(3, IBQ),
    "split": SplitQuantizerConfig(dim=4, acoustic_levels=2, level=VectorQuantizerConfig(codebook_size=8, dim=3)),
}


def latents(*shape, dim=4, seed=1):
    return jax.random.normal(jax.random.key(seed), (*shape, dim))


def made(config):
    """The quantiser, its moving averages past their start."""
    quantizer = make_quantizer(config, rngs=nnx.Rngs(0))
    for _, module in nnx.iter_modules(quantizer):
        if hasattr(module, "initialized"):
            module.initialized[...] = np.array(True)
    return quantizer


def evaluate(quantizer, z, weights=None):
    return _evaluate(*nnx.split(quantizer), z, jnp.ones(z.shape[:-1]) if weights is None else weights)


def gradients(quantizer, z, upstream, weights=None):
    """Of sum(quantized * upstream) + losses, by z and by the parameters under their names."""
    graphdef, params, rest = nnx.split(quantizer, nnx.Param, ...)
    weights = jnp.ones(z.shape[:-1]) if weights is None else weights
    by_params, by_z = _gradients(graphdef, params, rest, z, upstream, weights)
    return np.asarray(by_z), flatten(by_params)


def parameters(quantizer):
    """Under their names."""
    return flatten(nnx.state(quantizer, nnx.Param))


@partial(jax.jit, static_argnums=0)
def _evaluate(graphdef, state, z, weights):
    return nnx.merge(graphdef, state, copy=True)(z, training=False, weights=weights)


@partial(jax.jit, static_argnums=0)
def _gradients(graphdef, params, rest, z, upstream, weights):
    def loss(params, z):
        result = nnx.merge(graphdef, params, rest, copy=True)(z, training=False, weights=weights)
        return (result.quantized * upstream).sum() + result.commitment + result.auxiliary

    return jax.grad(loss, (0, 1))(params, z)
