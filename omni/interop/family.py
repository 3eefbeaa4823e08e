"""What a family of public models says of itself, and what all families that are shaped like Llama share."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

import omni_tokenizers
from omni.model import RopeScaling, TransformerConfig
from omni.vocabulary import MULTIPLE, Vocabulary
from omni_tokenizers.checkpoints.family import Settings
from omni_tokenizers.errors import OmniError
from omni_tokenizers.text_public import PublicTextTokenizer, public_text

if TYPE_CHECKING:
    from omni.bundle import Model


ADDED_TOKENS = "added_tokens"
"""Where `Settings` of a directory have, beside config.json's own keys, the ids by name that its tokenizer adds."""

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Place:
    """One tensor here and there."""

    ours: str
    """Dotted name of a parameter of the transformer."""
    theirs: str
    """Name in the checkpoint."""
    layer: int | None = None
    """Which layer of a parameter that stacks all of them; None: the whole parameter."""


@dataclasses.dataclass(frozen=True)
class Preset:
    """How a family writes documents."""

    vocabulary: Vocabulary
    declaration: Mapping[str, Any]
    """The grammar."""
    generation: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    """Settings with which the family's own tools draw, name -> modality -> value."""


@dataclasses.dataclass(frozen=True)
class Family:
    """How the directories of one kind relate to a model here."""

    name: str
    """What messages call it."""
    model_type: str
    """"model_type" in config.json; several families may have one."""
    context_length: int
    """max_position_embeddings where config.json leaves it out."""
    read: Callable[[Settings], TransformerConfig]
    """The transformer's configuration from a config.json."""
    write: Callable[[Model], dict[str, Any]]
    """The content of a config.json."""
    lacks: Callable[[Model], str | None]
    """What of a model this family does not have; None where it can hold the model."""
    preset: Callable[[Settings, TransformerConfig, PublicTextTokenizer | None], Preset]
    """Vocabulary and grammar, from a config.json and the text tokenizer if there is one."""
    places: Callable[[TransformerConfig, str], Iterable[Place]]
    """Which tensor is which, for a configuration and a prefix of names; made as they are asked for where a
    configuration may ask for many."""
    holds: Callable[[Settings], bool] = lambda settings: True
    """Whether a config.json of this type is this family's; of several of one type the first that says so counts."""
    text: Callable[[epath.Path, np.ndarray | None], PublicTextTokenizer | None] = public_text
    """The text tokenizer of a directory, if it has one, for these ids or all that are text."""
    image_processor_type: str | None = None
    """transformers' class that scales pictures."""
    prefix: str = "model."
    """What stands before the names of the transformer's tensors."""
    other_prefixes: tuple[str, ...] = ()
    """What may stand in its place."""
    others: tuple[str, ...] = ()
    """Beginnings of the names of tensors that are not the transformer's."""
    tokenizers: Callable[[epath.Path], Mapping[str, omni_tokenizers.Tokenizer]] = lambda directory: {}
    """Tokenizers inside the weights, by modality."""
    more_tensors: Callable[[Model], Mapping[str, np.ndarray]] = lambda model: {}
    """Tensors of an export that are not the transformer's."""
    carries: Callable[[Model], Collection[str]] = lambda model: ()
    """Modalities whose tokenizers such an export holds whole."""
    section: Callable[[Settings], Settings] = lambda settings: settings
    """The part of a config.json that is about the transformer."""
    tied: Callable[[Settings, Collection[str]], bool] | None = None
    """Whether embedding and head are one, where names of tensors decide it; None: config.json says so."""
    frame: tuple[str, str] = ("", "")
    """Tokens that transformers' processor puts around what a chat template has written (`ChatTemplate.frame`)."""


# Names of tensors

LAYER = {
    "attention_norm": "input_layernorm.weight",
    "query": "self_attn.q_proj.weight",
    "key": "self_attn.k_proj.weight",
    "value": "self_attn.v_proj.weight",
    "output": "self_attn.o_proj.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
NORMS = {
    "none": {},
    "rms": {"query_norm": "self_attn.q_norm.weight", "key_norm": "self_attn.k_norm.weight"},
    "layer": {
        "query_norm": "self_attn.q_norm.weight",
        "query_norm_bias": "self_attn.q_norm.bias",
        "key_norm": "self_attn.k_norm.weight",
        "key_norm_bias": "self_attn.k_norm.bias",
    },
}


def llama_places(config: TransformerConfig, prefix: str, head: str = "lm_head.weight") -> list[Place]:
    """The tensors of a model that is shaped like Llama."""
    names = LAYER | NORMS[config.qk_norm]
    layers = [
        Place(f"blocks.{ours}", f"{prefix}layers.{layer}.{theirs}", layer)
        for layer in range(config.depth)
        for ours, theirs in names.items()
    ]
    ends = [Place("embedding", f"{prefix}embed_tokens.weight"), Place("norm", f"{prefix}norm.weight")]
    return [*ends, *layers, *([] if config.tied_embeddings else [Place("head", head)])]


# config.json

_REFUSED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
}
_SIZES = {
    "vocab_size": "vocabulary_size",
    "num_hidden_layers": "depth",
    "hidden_size": "dim",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_dim",
}


def read_config(settings: Settings, defaults: Mapping[str, Any], **fixed: Any) -> TransformerConfig:
    """The configuration of a model that is shaped like Llama.

    Args:
      defaults: the family's values of what a config.json may leave out: sizes, rms_norm_eps, rope_theta,
        tie_word_embeddings, and num_key_value_heads and head_dim where they do not follow from the others.
      fixed: what all models of the family have.

    Raises:
      OmniError: something that the transformer here does not compute, by its name.
    """
    for key, value in _REFUSED.items():
        settings.require(key, value)
    if any(kind != "full_attention" for kind in settings.get("layer_types", ("full_attention",))):
        raise OmniError(f"{settings.source}: layer_types other than 'full_attention' are not supported here")
    if settings.values.get("quantization_config") is not None:
        raise OmniError(f"{settings.source}: quantization_config: quantised weights are not supported here")
    sizes = {ours: settings.get(theirs, defaults[theirs]) for theirs, ours in _SIZES.items()}
    heads = sizes["heads"]
    theta, scaling = _rope(settings, defaults["rope_theta"])
    return TransformerConfig(
        **sizes,
        key_value_heads=settings.get("num_key_value_heads", defaults.get("num_key_value_heads", heads)),
        head_dim=settings.get("head_dim", defaults.get("head_dim", sizes["dim"] // max(heads, 1))),
        norm_epsilon=settings.get("rms_norm_eps", defaults["rms_norm_eps"]),
        rope_theta=theta,
        rope_scaling=scaling,
        tied_embeddings=settings.get("tie_word_embeddings", defaults["tie_word_embeddings"]),
        **fixed,
    )


def _rope(settings: Settings, theta: float) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary frequencies; transformers 5 keeps both in one object, 4 the base outside of it."""
    key = "rope_parameters" if settings.values.get("rope_parameters") else "rope_scaling"
    values = settings.values.get(key) or {}
    if not isinstance(values, dict):
        raise OmniError(f"{settings.source}: {key} must be a JSON object, found {type(values).__name__}")
    inner = Settings(values, f"{settings.source}: {key}")
    inner.require("partial_rotary_factor", 1.0)
    theta, kind = (
        inner.get("rope_theta", settings.get("rope_theta", theta)),
        values.get("rope_type", values.get("type")),
    )
    if kind in (None, "default"):
        return theta, None
    if kind != "llama3":
        raise OmniError(f"{inner.source}: rope_type = {kind!r} is not supported here, only 'default' and 'llama3'")
    frequencies = (inner.get(name, 0.0) for name in ("low_freq_factor", "high_freq_factor"))
    length = inner.get("original_max_position_embeddings", 0)
    return theta, RopeScaling(inner.get("factor", 0.0), *frequencies, length)


def write_config(model: Model, name: str, architecture: str) -> dict[str, Any]:
    """What `read_config` reads back, as transformers has it."""
    config, control = model.config, model.grammar.control
    ends = [control["eos"], *(id for name, id in model.vocabulary.special.items() if name.startswith("<eos "))]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_frequency,
            "high_freq_factor": config.rope_scaling.high_frequency,
            "original_max_position_embeddings": config.rope_scaling.original_length,
        }
    return {
        "model_type": name,
        "architectures": [architecture],
        **{theirs: getattr(config, ours) for theirs, ours in _SIZES.items()},
        "vocab_size": config.embedded,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tied_embeddings,
        "max_position_embeddings": model.context_length,
        "bos_token_id": control["bos"],
        "eos_token_id": ends if len(ends) > 1 else control["eos"],
        "pad_token_id": control["pad"],
    }


def llama_lacks(config: TransformerConfig, **fixed: Any) -> str | None:
    """What a family that is shaped like Llama, and has `fixed` settings, lacks of a configuration; None: nothing."""
    usual = {"experts": 0, "rope": "time", "norm_order": "pre", "qk_norm_per_head": False}
    usual |= {"code_nets": None, "vision": None}
    for name, value in (usual | fixed).items():
        if getattr(config, name) != value:
            return f"{name} {getattr(config, name)!r}"
    return None


# Text alone


def text_preset(settings: Settings, config: TransformerConfig, text: PublicTextTokenizer | None) -> Preset:
    """Documents of text alone: all published ids but control tokens are text, of a tokenizer's ids those it may give.

    A family may begin and end documents with one token. Padding that is no other control token keeps its id; the turn,
    and what else is missing, comes behind the published ids.
    """
    published = config.vocabulary_size
    ids = control_ids(settings, published)
    names = {role: f"<{role}>" for role in ("bos", "turn", "eos", "pad")}
    more = {role: f"<{role}>" for role in ids.keys() - names.keys()}
    if "bos" in ids and ids["bos"] == ids.get("eos"):
        names["bos"] = names["eos"]
    size = with_new_ids(ids, published, ("bos", "turn", "eos", "pad"))
    special = {(names | more)[role]: token for role, token in ids.items()}
    pieces = text_ids(published, text, list(ids.values()))
    declaration = {"format": 1, "control": names, "modalities": {"text": {"block": "text"}}}
    return Preset(Vocabulary(size, {"text": pieces}, special), declaration)


def control_ids(settings: Settings, published: int) -> dict[str, int]:
    """Ids of bos, eos and pad as a config.json gives them, as far as it does.

    Of several eos the first ends documents here; the others are "eos 2", "eos 3" ..., neither text nor ever emitted.
    """
    ids: dict[str, int] = {}
    for role in ("bos", "eos", "pad"):
        value = settings.values.get(f"{role}_token_id")
        given = value if role == "eos" and isinstance(value, list) else [value]
        values = [each for each in given if each not in (None, -1)]
        for each in values:
            if type(each) is not int or not 0 <= each < published:
                raise OmniError(f"{settings.source}: {role}_token_id = {each!r} is no id below {published}")
        values = list(dict.fromkeys(values))
        for number, value in enumerate(values, start=1):
            if value not in ids.values() or (role != "pad" and number == 1):
                ids[role if number == 1 else f"{role} {number}"] = value
        if role == "eos" and len(values) > 1:
            log.warning("%s: of several eos_token_id one, %s, ends replies here", settings.source, ids["eos"])
    return ids


def with_new_ids(ids: dict[str, int], published: int, roles: Sequence[str]) -> int:
    """Gives the roles that `ids` lacks ids behind the published ones; the vocabulary's size with them."""
    new = [role for role in roles if role not in ids]
    ids |= {role: published + number for number, role in enumerate(new)}
    return -(-(published + len(new)) // MULTIPLE) * MULTIPLE if new else published


def text_ids(published: int, text: PublicTextTokenizer | None, taken: list[int]) -> np.ndarray:
    """Ids that are text, int32 ascending: of the tokenizer's, or without one of all published, those not `taken`."""
    pieces = np.arange(published) if text is None else text.ids[text.ids < published]
    return np.setdiff1d(pieces, taken).astype(np.int32)
