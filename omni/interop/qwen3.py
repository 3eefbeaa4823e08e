"""Qwen3's dense text models (Yang et al. 2025, arXiv:2505.09388): Llama with queries and keys normalised.

Checked against transformers 5.23.0.
"""

from omni.interop.family import Family, llama_lacks, llama_places, read_config, text_preset, write_config

DEFAULTS = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}

FAMILY = Family(
    name="qwen3",
    model_type="qwen3",
    context_length=32_768,
    read=lambda settings: read_config(settings, DEFAULTS, qk_norm="rms"),
    write=lambda model: write_config(model, "qwen3", "Qwen3ForCausalLM"),
    lacks=lambda model: llama_lacks(model.config, qk_norm="rms"),
    preset=text_preset,
    places=llama_places,
)
