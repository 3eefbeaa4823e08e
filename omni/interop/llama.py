"""Llama: text models from Llama 2 (Touvron et al. 2023, arXiv:2307.09288) to Llama 3.1 (arXiv:2407.21783).

Checked against transformers 5.23.0.
"""

from omni.interop.family import Family, llama_lacks, llama_places, read_config, text_preset, write_config

DEFAULTS = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}

FAMILY = Family(
    name="llama",
    model_type="llama",
    context_length=2048,
    read=lambda settings: read_config(settings, DEFAULTS, qk_norm="none"),
    write=lambda model: write_config(model, "llama", "LlamaForCausalLM"),
    lacks=lambda model: llama_lacks(model.config, qk_norm="none"),
    preset=text_preset,
    places=llama_places,
)
