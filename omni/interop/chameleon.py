"""Chameleon (arXiv:2405.09818): text and pictures, in the order of 7B (norms before) and of 34B ("swin": norms after).

Its vocabulary names the codes of pictures and scatters them: code 305 is IMGIMGDAFZ. The id of `<image>` is a
placeholder of transformers' own, which no document holds. Checked against transformers 5.23.0, which has no decoder of
pictures: one that lies in tokenizers/image (`omni import vqgan.ckpt DIR/tokenizers/image`) goes before what the weights
hold, and an export leaves it there. Anole (arXiv:2407.06135) is the same with other weights, Lumina-mGPT with other
documents (`lumina_grammar`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath
from PIL.Image import Resampling

import omni_tokenizers
from omni.image_processor import ImageProcessor
from omni.interop.family import (
    Family,
    Preset,
    control_ids,
    llama_lacks,
    llama_places,
    read_config,
    text_ids,
    with_new_ids,
    write_config,
)
from omni.interop.pictures import PLACEHOLDER, code_table, stages, vocabulary_map
from omni.model import TransformerConfig
from omni.vocabulary import Vocabulary
from omni_tokenizers.checkpoints.family import Settings
from omni_tokenizers.checkpoints.vqgan import to_transformers, without_decoder
from omni_tokenizers.text_public import PublicTextTokenizer
from omni_tokenizers.vqgan import VQGANTokenizer

if TYPE_CHECKING:
    from omni.bundle import Model

DEFAULTS = {
    "vocab_size": 65_536,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
ROLES = {
    "bos": "<s>",
    "turn": "<reserved08706>",
    "eos": "</s>",
    "pad": "<pad>",
    "begin": "<racm3:break>",
    "end": "<eoss>",
}
"""Names in the vocabulary of what a document is written with."""
SCALING = {
    "resample": int(Resampling.LANCZOS),
    "rescale_factor": 1 / 127.5,
    "image_mean": (1.0, 1.0, 1.0),
    "image_std": (1.0, 1.0, 1.0),
}
"""Of pictures to [-1, 1], as Chameleon was trained; in transformers the factor is 0.0078, which ends at 0.989."""
LUMINA_ROW_END, LUMINA_SIZE = 8803, 8804
"""Ids of Lumina-mGPT's ends of rows, and of a side of no units; those of more units follow."""
_VQMODEL = "model.vqmodel."
_LETTERS, _DIGITS = "ABCDEFGHIJ", "0123456789"
CODE = re.compile(rf"IMGIMG([{_LETTERS}]{{1,9}})Z")
_NO_TEXT = re.compile(rf"{CODE.pattern}|<reserved\d+>|<unk>|<mask>|{PLACEHOLDER}")


def read(settings: Settings) -> TransformerConfig:
    """The transformer's configuration."""
    settings.require("rms_norm_eps", 1e-5)  # that of the norms of queries and keys, which no config.json says
    order = "swin" if settings.get("swin_norm", False) else "pre"
    return read_config(settings, DEFAULTS, qk_norm="layer", qk_norm_per_head=True, norm_order=order)


def preset(settings: Settings, config: TransformerConfig, text: PublicTextTokenizer | None) -> Preset:
    """Text and pictures of one size, as `vocabulary_map` names their tokens; roles that it lacks get new ids.

    Raises:
      OmniError: no map, or names of pictures' codes that are not those of 0, 1, 2, ..., each once.
    """
    names = vocabulary_map(settings, config.vocabulary_size)
    pictures = settings.section("vq_config")
    named = [(_code(name), token) for name, token in names.items() if CODE.fullmatch(name)]
    codes = code_table(named, pictures.get("num_embeddings", 8192), settings.source)
    side = pictures.get("resolution", 512) // 2 ** (stages(pictures, (1, 1, 2, 2, 4)) - 1)
    ids = control_ids(settings, config.vocabulary_size)
    ids |= {role: names[name] for role, name in ROLES.items() if name in names}
    size = with_new_ids(ids, config.vocabulary_size, tuple(ROLES))
    special = {ROLES.get(role, f"<{role}>"): token for role, token in ids.items()}
    special |= {name: names[name] for name in (PLACEHOLDER,) if name in names}
    no_text = [token for name, token in names.items() if _NO_TEXT.fullmatch(name)]
    blocks = {"text": text_ids(config.vocabulary_size, text, [*no_text, *special.values()]), "image": codes}
    scaling = ImageProcessor(**SCALING, side=pictures.get("resolution", 512)).to_json()
    return Preset(Vocabulary(size, blocks, special), grammar({"rows": side, "columns": side}, preprocessing=scaling))


def grammar(*shapes: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The declaration: pictures of these shapes between begin and end; `more` is of pictures, too."""
    image = {"codebooks": ["image"], "open": [ROLES["begin"]], "close": [ROLES["end"]], "shapes": list(shapes), **more}
    return {
        "format": 1,
        "control": {role: ROLES[role] for role in ("bos", "turn", "eos", "pad")},
        "modalities": {"text": {"block": "text"}, "image": image},
    }


def lumina_grammar(pixels: int) -> dict[str, Any]:
    """The declaration of Lumina-mGPT (arXiv:2408.02657), which is Chameleon's transformer taught to draw at sizes of
    about `pixels` squared: rows, then columns in units of 32 pixels stand before the codes, and rows have ends.

    Sizes are the largest of that area at ratios up to 4, for each number of columns.
    """
    most, unit = (pixels // 32) ** 2, 2  # codes of 16 pixels
    sizes = {(most // columns, columns) for columns in range(1, most + 1)}
    sizes = sorted(size for size in sizes if max(size) <= 4 * min(size))
    shapes = [
        {"rows": unit * rows, "columns": unit * columns, "prefix": [LUMINA_SIZE + rows, LUMINA_SIZE + columns]}
        for rows, columns in sizes
    ]
    return grammar(*shapes, row_end=LUMINA_ROW_END)


def _code(name: str) -> int:
    """The code that a name stands for."""
    return int(CODE.fullmatch(name)[1].translate(str.maketrans(_LETTERS, _DIGITS)))


def _name(code: int) -> str:
    return f"IMGIMG{str(code).translate(str.maketrans(_DIGITS, _LETTERS))}Z"


def write(model: Model) -> dict[str, Any]:
    """The content of config.json; `vocabulary_map` has the names that transformers and this package look for."""
    values = write_config(model, "chameleon", "ChameleonForConditionalGeneration")
    del values["head_dim"]
    pictures, _ = to_transformers(without_decoder(model.tokenizers["image"]))
    names = {_name(code): token for code, token in enumerate(model.vocabulary.block("image").tolist())}
    swin = model.config.norm_order == "swin"
    more = {"swin_norm": swin, "model_parallel_size": 1, "attention_bias": False, "mlp_bias": False}
    return values | more | {"vq_config": pictures, "vocabulary_map": dict(model.vocabulary.special) | names}


def lacks(model: Model) -> str | None:
    """What this family lacks of a model."""
    config, tokenizer = model.config, model.tokenizers.get("image")
    if not isinstance(tokenizer, VQGANTokenizer) or tokenizer.config.normalized_codes:
        return "model without its image tokenizer, a VQGAN"
    if config.heads * config.head_dim != config.dim:
        return f"heads of {config.head_dim} in a width of {config.dim}"
    fixed = {"qk_norm": "layer", "qk_norm_per_head": True, "norm_epsilon": 1e-5, "norm_order": config.norm_order}
    return llama_lacks(config, **fixed)


def tokenizers(directory: epath.Path) -> dict[str, omni_tokenizers.Tokenizer]:
    """The encoder and codebook of pictures in the weights."""
    return {"image": omni_tokenizers.load(directory)}


def more_tensors(model: Model) -> dict[str, np.ndarray]:
    """The encoder and codebook of pictures, under their names."""
    _, tensors = to_transformers(without_decoder(model.tokenizers["image"]))
    return {f"{_VQMODEL}{name}": value for name, value in tensors.items()}


FAMILY = Family(
    name="chameleon",
    model_type="chameleon",
    context_length=4096,
    read=read,
    write=write,
    lacks=lacks,
    preset=preset,
    image_processor_type="ChameleonImageProcessor",
    places=llama_places,
    others=(_VQMODEL,),
    tokenizers=tokenizers,
    more_tensors=more_tensors,
    carries=lambda model: () if model.tokenizers["image"].config.has_decoder else ("image",),
    frame=("bos_token", "sep_token"),
)
