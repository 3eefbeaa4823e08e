"""Tiny language models of transformers with noise in every parameter, as directories, and what they say of ids."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from public_models import noise_tensors

from omni_tokenizers import weights

VOCABULARY = 96
_SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "tie_word_embeddings": False,
    "max_position_embeddings": 160,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Of a head's eight wavelengths (6 to 1400 tokens) some are above, some below, some between 64 / 4 and 64 / 1.
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Codes of pictures lie scattered among text, in no order.
_CODES = (*"ABCDEFGHIJ", "BA", "BB", "BC", "BD", "BE", "BF")
_SCATTERED = (40, 7, 23, 61, 12, 33, 58, 19, 70, 26, 9, 47, 66, 15, 52, 30)
_CHAMELEON = _SHARED | {
    "rms_norm_eps": 1e-5,
    "vq_config": {
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "embed_dim": 8,
        "latent_channels": 8,
        "num_embeddings": 16,
        "resolution": 8,
    },
    "vocabulary_map": {f"IMGIMG{name}Z": token for name, token in zip(_CODES, _SCATTERED, strict=True)}
    | {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<eoss>": 80, "<racm3:break>": 81, "<image>": 82}
    | {"<reserved08706>": 83, "<reserved08708>": 84},
}
_SHAPE = {key: value for key, value in _SHARED.items() if key not in ("tie_word_embeddings",)}
_EMU3 = {
    "text_config": _SHAPE | {"pad_token_id": 0},
    "vq_config": {
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "hidden_size": 32,
        "codebook_size": 16,
    },
    "vocabulary_map": {f"<|visual token {code:06}|>": 76 + code for code in range(16)}
    | {"<|image start|>": 70, "<|image token|>": 71, "<|extra_200|>": 72, "<|extra_201|>": 73, "<|image end|>": 74}
    | {"<image>": 75}
    | {character: 20 + number for number, character in enumerate("0123456789*")},
}


@dataclasses.dataclass(frozen=True)
class Theirs:
    """A family of transformers at one tiny configuration."""

    kind: str
    """Name of the classes before Config and ForCausalLM (or ForConditionalGeneration)."""
    settings: dict[str, Any]

    def write(self, directory: Path):
        """Writes the model, every tensor noise, and returns it, in evaluation."""
        name = "ForConditionalGeneration" if "vocabulary_map" in self.settings else "ForCausalLM"
        kind = getattr(transformers, self.kind + name)
        kind(getattr(transformers, f"{self.kind}Config")(**self.settings)).save_pretrained(directory)
        shapes = {key: list(value.shape) for key, value in weights.read(directory / "model.safetensors").items()}
        weights.write(directory / "model.safetensors", noise_tensors(shapes), {"format": "pt"})
        return kind.from_pretrained(directory, attn_implementation="eager").eval().requires_grad_(False)


CASES = {
    "llama": Theirs("Llama", _SHARED | {"head_dim": 16}),
    "llama tied": Theirs("Llama", _SHARED | {"tie_word_embeddings": True}),
    "llama 3": Theirs("Llama", _SHARED | {"head_dim": 16, "rope_parameters": _LLAMA3}),
    "qwen3": Theirs("Qwen3", _SHARED | {"head_dim": 16, "eos_token_id": 1}),
    "chameleon": Theirs("Chameleon", _CHAMELEON),
    "chameleon swin": Theirs("Chameleon", _CHAMELEON | {"swin_norm": True, "model_parallel_size": 2}),
    "emu3": Theirs("Emu3", _EMU3),
    "qwen3 tied": Theirs("Qwen3", _SHARED | {"head_dim": 12, "tie_word_embeddings": True}),
}


def their_logits(model, ids: np.ndarray) -> np.ndarray:
    """float32 [batch, length, vocabulary], before any mask that a family lays over them."""
    with torch.no_grad():
        return model.lm_head(model.model(input_ids=torch.tensor(ids)).last_hidden_state).numpy()


def greedy(model, ids: np.ndarray, tokens: int) -> np.ndarray:
    """The likeliest tokens one after the other, each from a pass over all before it: [batch, tokens]."""
    for _ in range(tokens):
        best = their_logits(model, ids)[:, -1].argmax(-1)
        ids = np.concatenate([ids, best[:, None]], axis=1)
    return ids[:, -tokens:]


def loaded(directory: Path):
    """What transformers makes of a directory, and the keys that it misses or does not know."""
    found = transformers.AutoConfig.from_pretrained(directory)
    kind = getattr(transformers, found.architectures[0])
    model, report = kind.from_pretrained(directory, output_loading_info=True, attn_implementation="eager")
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return model.eval(), [key for kind in kinds for key in report[kind]]
