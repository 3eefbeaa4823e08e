"""Tiny language models of transformers with noise in every parameter, as directories, and what they say of ids.

A family that transformers lacks is written by the class that computes the same, under its own config.json.
"""

import dataclasses
import json
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
_JANUS = {
    "text_config": _SHAPE | {"pad_token_id": 0},
    "vision_config": {
        "image_size": 8,
        "patch_size": 2,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "mlp_ratio": 1.5,
        "layer_norm_eps": 1e-3,
        "projection_dim": 32,
        "num_image_tokens": 16,
    },
    "vq_config": {
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "latent_channels": 8,
        "embed_dim": 6,
        "num_embeddings": 40,
        "projection_dim": 32,
        "image_token_embed_dim": 32,
    },
    "image_token_id": 90,
    "tie_word_embeddings": False,
}
_JANUS_NAMES = {"<begin_of_image>": 91, "<end_of_image>": 92, "<image_placeholder>": 90}
# Text, 203 control tokens up to the end of a row, five more, codes of pictures.
_EMU3_5 = {"vocab_size": 448, "head_dim": 16, "bos_token_id": 303, "eos_token_id": 304, "pad_token_id": 97}
_EMU3_5_ITSELF = {
    "model_type": "Emu3",
    "architectures": ["Emu3ForCausalLM"],
    "rope_parameters": None,
    "rope_theta": 500.0,
    "eol_token_id": 300,
    "img_token_id": 305,
    "boi_token_id": 306,
    "eoi_token_id": 307,
}
_ANYGPT = ["[Human]", "[MMGPT]", "<eoh>", "<eos>"]
for _letters, _prefix, _count in (("im", "👀", 8), ("sp", "🗣️", 6), ("mu", "🎶", 4 * 5)):
    _ANYGPT += [f"<{_prefix}{code}>" for code in range(_count)] + [f"<so{_letters}>", f"<eo{_letters}>"]


@dataclasses.dataclass(frozen=True)
class Theirs:
    """A family of transformers at one tiny configuration."""

    kind: str
    """Name of the classes before Config and ForCausalLM (or ForConditionalGeneration)."""
    settings: dict[str, Any]
    itself: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What config.json says otherwise where the class only stands in for the family's own; None: nothing."""
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    """Other files of the directory, by name."""

    def write(self, directory: Path):
        """Writes the model, every tensor noise, and returns it, in evaluation."""
        name = "ForConditionalGeneration" if "vq_config" in self.settings else "ForCausalLM"
        kind = getattr(transformers, self.kind + name)
        kind(getattr(transformers, f"{self.kind}Config")(**self.settings)).save_pretrained(directory)
        shapes = {key: list(value.shape) for key, value in weights.read(directory / "model.safetensors").items()}
        weights.write(directory / "model.safetensors", noise_tensors(shapes), {"format": "pt"})
        model = kind.from_pretrained(directory, attn_implementation="eager").eval().requires_grad_(False)
        if self.itself:
            config = json.loads((directory / "config.json").read_text()) | self.itself
            (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        for name, content in self.files.items():
            (directory / name).write_text(content)
        return model


CASES = {
    "llama": Theirs("Llama", _SHARED | {"head_dim": 16}),
    "llama tied": Theirs("Llama", _SHARED | {"tie_word_embeddings": True}),
    "llama 3": Theirs("Llama", _SHARED | {"head_dim": 16, "rope_parameters": _LLAMA3}),
    "qwen3": Theirs("Qwen3", _SHARED | {"head_dim": 16, "eos_token_id": 1}),
    "chameleon": Theirs("Chameleon", _CHAMELEON),
    "chameleon swin": Theirs("Chameleon", _CHAMELEON | {"swin_norm": True, "model_parallel_size": 2}),
    "emu3": Theirs("Emu3", _EMU3),
    "janus": Theirs("Janus", _JANUS, files={"added_tokens.json": json.dumps(_JANUS_NAMES)}),
    "janus tied": Theirs(
        "Janus",
        _JANUS | {"tie_word_embeddings": True},
        files={"added_tokens.json": json.dumps(_JANUS_NAMES)},
    ),
    "qwen3 tied": Theirs("Qwen3", _SHARED | {"head_dim": 12, "tie_word_embeddings": True}),
    "emu3.5": Theirs("Qwen3", _SHARED | _EMU3_5, _EMU3_5_ITSELF),
    "anygpt": Theirs(
        "Llama",
        _SHARED,
        files={"added_tokens.json": json.dumps({name: 52 + place for place, name in enumerate(_ANYGPT)})},
    ),
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


def loaded(directory: Path, stands_in: str | None = None):
    """What transformers makes of a directory, and the keys that it misses or does not know.

    Args:
      stands_in: kind of the classes to take where it has none of that model_type.
    """
    if stands_in is None:
        config = transformers.AutoConfig.from_pretrained(directory)
    else:
        values = json.loads((directory / "config.json").read_text()) | {"architectures": [f"{stands_in}ForCausalLM"]}
        config = getattr(transformers, f"{stands_in}Config")(**{k: v for k, v in values.items() if k != "model_type"})
    kind = getattr(transformers, config.architectures[0])
    model, report = kind.from_pretrained(
        directory, config=config, output_loading_info=True, attn_implementation="eager"
    )
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return model.eval(), [key for kind in kinds for key in report[kind]]
