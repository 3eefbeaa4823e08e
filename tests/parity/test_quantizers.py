"""Quantisers against transformers' DAC, Mimi and X-Codec-2, with every parameter random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omni_tokenizers import weights
from omni_tokenizers.checkpoints.interop import Pair, from_state, to_state
from omni_tokenizers.quantizers import (
    FSQConfig,
    LearnedQuantizerConfig,
    ResidualQuantizerConfig,
    SplitQuantizerConfig,
    VectorQuantizerConfig,
    make_quantizer,
)

torch = pytest.importorskip("torch", reason="needs torch: pip install 'omni-any-to-any[parity]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'omni-any-to-any[parity]'")

pytestmark = pytest.mark.parity

RANDOM = np.random.default_rng(0)
Z = RANDOM.normal(size=(2, 9, 12)).astype(np.float32)
UPSTREAM = RANDOM.normal(size=Z.shape).astype(np.float32)


def noisy(module):
    """The module with noise in every parameter and floating point buffer."""
    generator = torch.Generator().manual_seed(0)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data = torch.randn(tensor.shape, generator=generator) * 0.5
    return module


def arrays(module):
    return {name: value.detach().numpy() for name, value in module.state_dict().items()}


def theirs(z):
    """[batch, time, dim] as PyTorch has it, [batch, dim, time]."""
    return torch.tensor(np.swapaxes(z, 1, 2).copy(), requires_grad=True)


def test_residual_levels_are_those_of_dac():
    """Values, codes, losses and the gradients by latents and every parameter agree with DAC's residual quantiser."""
    from transformers.models.dac.modeling_dac import DacConfig, DacResidualVectorQuantizer

    dac = noisy(
        DacResidualVectorQuantizer(DacConfig(hidden_size=12, codebook_dim=3, codebook_size=16, n_codebooks=4))
    ).eval()
    level = LearnedQuantizerConfig(codebook_size=16, dim=12, code_dim=3, normalize="search")
    ours = make_quantizer(ResidualQuantizerConfig(4, level), rngs=nnx.Rngs(0))
    pairs = []
    for i in range(4):
        pairs.append(Pair(f"levels.{i}.vectors", f"quantizers.{i}.codebook.weight"))
        for side in ("in", "out"):
            pairs.append(Pair(f"levels.{i}.project_{side}.bias", f"quantizers.{i}.{side}_proj.bias"))
            pairs.append(Pair(f"levels.{i}.project_{side}.kernel", f"quantizers.{i}.{side}_proj.weight", "linear"))
    # A convolution of width 1 is a linear map.
    tensors = {name: value[..., 0] if value.ndim == 3 else value for name, value in arrays(dac).items()}
    nnx.update(ours, to_state(ours, tensors, pairs, "dac"))
    graphdef, params = nnx.split(ours)

    @jax.jit
    def loss(params, z):
        result = nnx.merge(graphdef, params, copy=True)(z, training=True)
        return (result.quantized * UPSTREAM).sum() + result.commitment + result.auxiliary, result

    (total, result), (by_params, by_z) = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, jnp.asarray(Z))
    z = theirs(Z)
    quantized, codes, _, commitment, codebook = dac(z)
    expected = (quantized * theirs(UPSTREAM).detach()).sum() + (0.25 * commitment + codebook).mean() / 4
    expected.backward()
    np.testing.assert_array_equal(np.swapaxes(result.codes, 1, 2), codes.numpy())
    np.testing.assert_allclose(np.swapaxes(result.quantized, 1, 2), quantized.detach().numpy(), atol=1e-5)
    assert float(total) == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_allclose(np.swapaxes(by_z, 1, 2), z.grad.numpy(), rtol=1e-4, atol=1e-5)
    found = from_state(by_params, pairs)
    for name, parameter in dac.named_parameters():
        gradient = parameter.grad.numpy()
        assert np.abs(gradient).max() > 0
        np.testing.assert_allclose(found[name].reshape(gradient.shape), gradient, rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(
        np.swapaxes(ours.lookup(result.codes[..., :2]), 1, 2), dac.from_codes(codes[:, :2])[0].detach(), atol=1e-5
    )


def test_split_levels_are_those_of_mimi():
    """Codes and decoded values agree with Mimi's split quantiser, whatever number of levels decodes."""
    from transformers.models.mimi.modeling_mimi import MimiConfig, MimiSplitResidualVectorQuantizer

    config = MimiConfig(
        hidden_size=12, vector_quantization_hidden_dimension=5, codebook_dim=5, codebook_size=16, num_quantizers=4
    )
    mimi = noisy(MimiSplitResidualVectorQuantizer(config)).eval()
    level = VectorQuantizerConfig(codebook_size=16, dim=5)
    ours = make_quantizer(SplitQuantizerConfig(dim=12, acoustic_levels=3, level=level), rngs=nnx.Rngs(0))
    tensors = {name: value for name, value in weights.flatten(nnx.state(ours)).items() if "initialized" in name}
    for branch, levels in (("semantic", 1), ("acoustic", 3)):
        here, there = f"{branch}.residual.levels", getattr(mimi, f"{branch}_residual_vector_quantizer")
        for side in ("in", "out"):
            kernel = getattr(there, f"{side}put_proj").weight.detach().numpy()[..., 0].T
            tensors[f"{branch}.project_{side}.kernel"] = kernel
        for index in range(levels):
            book = there.layers[index].codebook
            # Even counts: Laplace smoothing, which Mimi has not, then changes nothing.
            book.cluster_usage.data = torch.full((16,), 3.0)
            book._embed = None
            tensors[f"{here}.{index}.sum"] = book.embed_sum.numpy()
            tensors[f"{here}.{index}.count"] = book.cluster_usage.numpy()
    nnx.update(ours, weights.unflatten(nnx.state(ours), tensors))
    result = jax.jit(lambda z: ours(z, training=False))(Z)
    codes = mimi.encode(theirs(Z).detach())
    np.testing.assert_array_equal(np.moveaxis(result.codes, -1, 0), codes.numpy())
    for levels in (1, 2, 4):
        decoded = mimi.decode(codes[:levels].transpose(0, 1)).detach().numpy()
        np.testing.assert_allclose(np.swapaxes(ours.lookup(result.codes[..., :levels]), 1, 2), decoded, atol=1e-5)
    np.testing.assert_allclose(np.swapaxes(result.quantized, 1, 2), decoded, atol=1e-5)


def test_scalars_are_those_of_x_codec_2():
    """Codes, values and gradients agree with X-Codec-2's finite scalars, for even and odd numbers of levels."""
    from transformers.models.xcodec2.modeling_xcodec2 import Xcodec2Config, Xcodec2FiniteScalarQuantization

    levels = [2, 3, 4, 5, 8, 4]
    config = Xcodec2Config()
    config.quantization_levels = levels
    fsq = Xcodec2FiniteScalarQuantization(config)
    ours = make_quantizer(FSQConfig(tuple(levels)), rngs=nnx.Rngs(0))
    x = 2 * RANDOM.normal(size=(300, 6)).astype(np.float32)
    upstream = RANDOM.normal(size=x.shape).astype(np.float32)
    z = torch.tensor(x, requires_grad=True)
    quantized, codes = fsq(z)
    (quantized * torch.tensor(upstream)).sum().backward()
    result = ours(x, training=False)
    np.testing.assert_array_equal(result.codes, codes.numpy())
    np.testing.assert_allclose(result.quantized, quantized.detach().numpy(), atol=1e-6)
    np.testing.assert_array_equal(ours.codebook(), fsq.codebook.numpy())
    gradient = jax.grad(lambda x: (ours(x, training=False).quantized * upstream).sum())(x)
    np.testing.assert_allclose(gradient, z.grad.numpy(), rtol=1e-4, atol=1e-6)
