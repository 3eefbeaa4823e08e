"""Distributions of the next token against transformers' logits processors, in the order in which it applies them."""

import jax.numpy as jnp
import numpy as np
import pytest

from omni.generate.sampling import penalise, weigh

torch = pytest.importorskip("torch", reason="needs torch: pip install 'omni-any-to-any[parity]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'omni-any-to-any[parity]'")

pytestmark = pytest.mark.parity

ROWS, SIZE = 64, 200
CASES = {
    "min_p": {"min_p": 0.1},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "a penalty below 1": {"repetition_penalty": 0.6},
    "all at once": {"repetition_penalty": 1.3, "temperature": 0.6, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
    "min_p after top_p": {"temperature": 2.0, "top_p": 0.5, "min_p": 0.3},
}


def their_distribution(logits: np.ndarray, ids: np.ndarray, settings: dict) -> np.ndarray:
    """Probabilities after the processors that transformers makes of these settings."""
    config = transformers.LlamaConfig(
        vocab_size=SIZE, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = transformers.LlamaForCausalLM(config)
    asked = transformers.GenerationConfig(do_sample=True, **({"top_k": 0} | settings))
    processors = model._get_logits_processor(asked, input_ids_seq_length=ids.shape[1], device="cpu")
    return processors(torch.tensor(ids), torch.tensor(logits)).softmax(-1).numpy()


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_same_distribution(settings):
    """Every probability within 1e-6, and the same ids left out."""
    random = np.random.default_rng(0)
    logits = random.normal(0, 3, (ROWS, SIZE)).astype(np.float32)
    ids = random.integers(SIZE, size=(ROWS, 30))
    seen = np.zeros((ROWS, SIZE), bool)
    seen[np.arange(ROWS)[:, None], ids] = True

    def column(name: str, neutral: float) -> jnp.ndarray:
        return jnp.full(ROWS, settings.get(name, neutral))

    ours = penalise(jnp.asarray(logits), jnp.asarray(seen), column("repetition_penalty", 1.0))
    names = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    weights = np.asarray(weigh(ours, jnp.ones_like(seen), *(column(*setting) for setting in names.items())))
    theirs = their_distribution(logits, ids, settings)
    np.testing.assert_allclose(weights / weights.sum(-1, keepdims=True), theirs, atol=1e-6)
    np.testing.assert_array_equal(weights > 0, theirs > 0)
