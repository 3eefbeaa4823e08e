"""The transformer's layers against transformers' Llama, Qwen3 and Chameleon, with every parameter random."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from omni.model import Transformer, TransformerConfig

torch = pytest.importorskip("torch", reason="needs torch: pip install 'omni-any-to-any[parity]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'omni-any-to-any[parity]'")

pytestmark = pytest.mark.parity

LLAMA = TransformerConfig(
    vocabulary_size=96,
    depth=3,
    dim=32,
    heads=4,
    key_value_heads=2,
    head_dim=8,
    mlp_dim=48,
    qk_norm="none",
    rope_theta=500.0,
    norm_epsilon=1e-3,
    tied_embeddings=False,
)
CASES = {
    "llama": LLAMA,
    "llama tied": dataclasses.replace(LLAMA, tied_embeddings=True),
    "qwen3": dataclasses.replace(LLAMA, qk_norm="rms", head_dim=16),
    # Chameleon's LayerNorm fixes its epsilon at 1e-5, apart from the other norms'.
    "chameleon": dataclasses.replace(LLAMA, qk_norm="layer", norm_epsilon=1e-5),
    "chameleon swin": dataclasses.replace(LLAMA, qk_norm="layer", norm_epsilon=1e-5, norm_order="swin"),
}
NAMES = {
    "query": "self_attn.q_proj.weight",
    "key": "self_attn.k_proj.weight",
    "value": "self_attn.v_proj.weight",
    "output": "self_attn.o_proj.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "attention_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "query_norm": "self_attn.q_norm.weight",
    "key_norm": "self_attn.k_norm.weight",
    "query_norm_bias": "self_attn.q_norm.bias",
    "key_norm_bias": "self_attn.k_norm.bias",
}


def theirs(family: str, config: TransformerConfig):
    """The tiny model of transformers, noise in every parameter; qk-norms equal in all heads, as one device has them."""
    shared = {
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_value_heads,
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tied_embeddings,
        "max_position_embeddings": 64,
        "attn_implementation": "eager",
    }
    if family == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(head_dim=config.head_dim, **shared))
    elif family == "qwen3":
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(head_dim=config.head_dim, **shared))
    else:
        pictures = {
            "base_channels": 32,
            "channel_multiplier": [1],
            "num_res_blocks": 1,
            "embed_dim": 8,
            "latent_channels": 8,
        }
        names = {"<image>": 1} | {f"IMGIMG{letter}Z": 4 + code for code, letter in enumerate("ABCD")}
        model = transformers.ChameleonForConditionalGeneration(
            transformers.ChameleonConfig(
                vocabulary_map=names,
                vq_config=pictures | {"num_embeddings": 4, "resolution": 32},
                swin_norm=config.norm_order == "swin",
                model_parallel_size=1,
                **shared,
            )
        )
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            per_head = "_norm." in name and parameter.ndim == 2
            noise = torch.randn_like(parameter[0] if per_head else parameter)
            parameter.copy_(0.3 * noise + (1 if name.endswith("norm.weight") else 0))
    return model.eval()


def ours(config: TransformerConfig, weights: dict[str, np.ndarray]) -> Transformer:
    """Our model with their weights: linear maps transposed, and heads unfolded."""
    text = {name.removeprefix("model.").removeprefix("language_model."): value for name, value in weights.items()}
    model = Transformer(config, rngs=nnx.Rngs(0))

    def stacked(name: str, shape: tuple[int, ...]) -> np.ndarray:
        layers = [text[f"layers.{layer}.{NAMES[name]}"] for layer in range(config.depth)]
        if name.startswith(("query_norm", "key_norm")) and layers[0].ndim == 2:
            layers = [layer[0] for layer in layers]
        return np.stack([layer.T.reshape(shape[1:]) for layer in layers])

    state = nnx.state(model, nnx.Param)
    filled = {"blocks": {name: stacked(name, leaf[...].shape) for name, leaf in state["blocks"].items()}}
    filled |= {"embedding": text["embed_tokens.weight"], "norm": text["norm.weight"]}
    if not config.tied_embeddings:
        filled["head"] = weights["lm_head.weight"]
    nnx.update(model, jax.tree.map(np.asarray, filled))
    return model


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_theirs(name):
    """Same weights, same logits within 1e-4 of the largest."""
    config = CASES[name]
    model = theirs(name.split()[0], config)
    weights = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    ids = np.random.default_rng(0).integers(10, config.vocabulary_size, (2, 24))
    with torch.no_grad():
        expected = model.lm_head(model.model(torch.tensor(ids)).last_hidden_state).numpy()
    positions = np.broadcast_to(np.arange(24)[None, :, None], (2, 24, 3))
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(ours(config, weights)(ids, positions, None))
    assert expected.std() > 0.1
    np.testing.assert_allclose(logits, expected, atol=1e-4 * max(1, np.abs(expected).max()), rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_every_weight_matters(name):
    """A change of any one of their tensors shows in our logits."""
    config = CASES[name]
    weights = {key: value.detach().numpy() for key, value in theirs(name.split()[0], config).state_dict().items()}
    ids = np.random.default_rng(0).integers(10, config.vocabulary_size, (1, 8))
    positions = np.broadcast_to(np.arange(8)[None, :, None], (1, 8, 3))
    apply, random = nnx.jit(lambda model: model(ids, positions, None)), np.random.default_rng(1)
    before = apply(ours(config, weights))
    for key in weights:
        if "vqmodel" in key or (config.tied_embeddings and key == "lm_head.weight"):
            continue
        noise = 0.3 * random.standard_normal(weights[key].shape).astype(np.float32)
        changed = apply(ours(config, weights | {key: weights[key] + noise}))
        assert np.abs(changed - before).max() > 1e-3, key
