"""Public checkpoints of whole models, in and out: a file for each family, and what families share.

A directory of transformers holds config.json, weights in safetensors and, if it is complete, tokenizer.json or
tokenizer.model. What it holds besides in this package's own form (vocabulary.json, grammar.json, generation.json,
tokenizers/MODALITY) goes before what its family is known for: so an export comes back as the model that it was.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath
from jax.sharding import Mesh

import omni_tokenizers
from omni.chat_template import SOURCE, ChatRenderer, ChatTemplate
from omni.grammar import Grammar
from omni.interop import anygpt, chameleon, emu3, emu3_5, janus, llama, qwen3
from omni.interop import chameleon_original as release
from omni.interop.family import ADDED_TOKENS, Family, Place, Preset
from omni.interop.pictures import PREPROCESSOR, with_file
from omni.interop.weights import NamedTensors, places_in, read_transformer, their_shapes, their_tensors
from omni.model import Transformer, TransformerConfig
from omni.vocabulary import LARGEST, Vocabulary
from omni_tokenizers.base import CHECKPOINT_CONFIG, LARGEST_CHECKPOINT_CONFIG, is_checkpoint, read_object
from omni_tokenizers.checkpoints import PLACES
from omni_tokenizers.checkpoints.family import Settings
from omni_tokenizers.errors import OmniError
from omni_tokenizers.tensor_files import open_directory, write_directory
from omni_tokenizers.text_json import JsonTextTokenizer
from omni_tokenizers.text_public import TEXT_FILES, PublicTextTokenizer, added_tokens

if TYPE_CHECKING:
    from omni.bundle import Model

log = logging.getLogger(__name__)
LONGEST_CONTEXT = 1 << 30
FAMILIES: tuple[Family, ...] = tuple(module.FAMILY for module in (chameleon, emu3, emu3_5, janus, anygpt, llama, qwen3))
"""A directory is of the first that holds it, an export of the first that lacks nothing: the special stand first."""
MODEL_TYPES = tuple(dict.fromkeys(family.model_type for family in FAMILIES))


@dataclasses.dataclass(frozen=True)
class Pieces:
    """What a `Model` is made of."""

    transformer: Transformer
    vocabulary: Vocabulary
    grammar: Grammar
    tokenizers: Mapping[str, omni_tokenizers.Tokenizer]
    context_length: int
    generation: Mapping[str, Mapping[str, float]] | None
    chat_template: ChatTemplate | None = None


def holds_model(path: epath.PathLike) -> bool:
    """Whether this is the directory of a whole model, rather than of a tokenizer, or a file.

    Raises:
      OmniError: a directory of transformers with neither that is known here.
    """
    if (epath.Path(path) / release.PARAMETERS).exists():
        return True
    path = epath.Path(path) / CHECKPOINT_CONFIG
    if not path.exists():
        return False
    kind = read_object(path, LARGEST_CHECKPOINT_CONFIG).get("model_type")
    if not isinstance(kind, str) or (kind not in MODEL_TYPES and kind not in PLACES):
        known = f"supported are {', '.join(MODEL_TYPES)}; of tokenizers {', '.join(PLACES)}"
        raise OmniError(f"{path}: nothing of type {kind!r} can be read; {known}")
    return kind in MODEL_TYPES


def is_public(directory: epath.PathLike) -> bool:
    """Whether a directory is one that others wrote; a run of this package is none."""
    return is_checkpoint(directory) or (epath.Path(directory) / release.PARAMETERS).exists()


def load_checkpoint(
    directory: epath.PathLike, mesh: Mesh | None = None, dtype: str = "float32", torch_reader: bool = False
) -> Pieces:
    """A public checkpoint's model.

    Tensors go one by one to the device or the devices, so that the host holds about one of them at a time. Where the
    published vocabulary lacks a token that the grammar needs (a turn, padding), the embedding and the head get rows
    behind the published ones, each the mean of those, and logits of published ids stay what they were.

    Args:
      mesh: the devices over which parameters are laid out by `ShardingRules`; None for one.
      dtype: type in which matrices are kept and activations computed, float32 or bfloat16.
      torch_reader: whether to read files of PyTorch, which are pickles, with torch's weights_only reader: those of
        Chameleon's own release.

    Raises:
      OmniError: an unknown family, settings that are not supported, or files that are missing or damaged.
    """
    directory = epath.Path(directory)
    if not (directory / CHECKPOINT_CONFIG).exists():
        return _load_release(directory, mesh, dtype, torch_reader)
    path = directory / CHECKPOINT_CONFIG
    values = read_object(path, LARGEST_CHECKPOINT_CONFIG)
    settings = Settings(values | {ADDED_TOKENS: added_tokens(directory)}, str(path))
    family = _family(settings)
    try:
        config = family.read(settings)
    except OmniError as error:
        raise OmniError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None
    if config.vocabulary_size > LARGEST:
        raise OmniError(f"{path}: vocab_size {config.vocabulary_size} is more than {LARGEST}")
    context = family.section(settings).get("max_position_embeddings", family.context_length)
    if not 1 <= context <= LONGEST_CONTEXT:
        raise OmniError(f"{path}: max_position_embeddings is {context}; it must be 1 to {LONGEST_CONTEXT}")
    tensors, settings_file = open_directory(directory), directory / "generation.json"
    if family.tied is not None:
        config = dataclasses.replace(config, tied_embeddings=family.tied(settings, tensors))
    places = places_in(tensors, config, family)
    try:
        text = family.text(directory, None)
        section = family.section(settings)
        named = None  # a template is read with names of tokens, of which those that config.json names are no text
        if isinstance(text, JsonTextTokenizer):
            named = family.text(directory, np.setdiff1d(text.ids, _named_ids(section)))
        template = ChatTemplate.of_checkpoint(directory, family.frame, _token_names(section, named))
        _end_as_closed(section, template, named)
        preset = _preset(directory, family, settings, config, text)
        grammar = Grammar(dict(preset.declaration), preset.vocabulary)
    except OmniError as error:
        raise OmniError(str(error) if str(error).startswith(str(directory)) else f"{directory}: {error}") from None
    return Pieces(
        _transformer(config, preset, tensors, places, mesh, dtype),
        preset.vocabulary,
        grammar,
        _tokenizers(directory, family, preset, any(name.startswith(family.others) for name in tensors)),
        context,
        read_object(settings_file) if settings_file.exists() else preset.generation,
        template,
    )


def _load_release(directory: epath.Path, mesh: Mesh | None, dtype: str, torch_reader: bool) -> Pieces:
    """Chameleon as Meta released it."""
    if not torch_reader:
        raise OmniError(
            f"{directory}: files of PyTorch are pickles; ask for torch's weights_only reader, which takes tensors "
            "alone: omni import --torch-reader, or torch_reader=True"
        )
    config, tensors = release.open_release(directory)
    preset, text = release.release_preset(directory, config)
    grammar = Grammar(dict(preset.declaration), preset.vocabulary)
    places = places_in(tensors, config, chameleon.FAMILY)
    transformer = _transformer(config, preset, tensors, places, mesh, dtype)
    tokenizers = {"text": text} | release.release_pictures(directory)
    return Pieces(transformer, preset.vocabulary, grammar, tokenizers, chameleon.FAMILY.context_length, None)


def _transformer(
    config: TransformerConfig,
    preset: Preset,
    tensors: NamedTensors,
    places: list[Place],
    mesh: Mesh | None,
    dtype: str,
) -> Transformer:
    published = config.embedded
    config = dataclasses.replace(config, vocabulary_size=preset.vocabulary.size, compute_dtype=dtype)
    return read_transformer(config, tensors, places, published, mesh)


def _family(settings: Settings) -> Family:
    kind = settings.values.get("model_type")
    for family in FAMILIES:
        if family.model_type == kind and family.holds(settings):
            return family
    known = ", ".join(MODEL_TYPES)
    raise OmniError(f"{settings.source}: no model of type {kind!r} can be read; supported are {known}")


def _named_ids(section: Settings) -> list[int]:
    """The ids of bos, eos and pad in config.json; what is none is refused where it is read (`control_ids`)."""
    values = [section.values.get(f"{role}_token_id") for role in ("bos", "eos", "pad")]
    return [id for value in values for id in (value if isinstance(value, list) else [value]) if type(id) is int]


def _token_names(section: Settings, text: JsonTextTokenizer | None) -> dict[str, str]:
    """Names of the tokens that config.json has ids of."""
    names = {} if text is None else {id: name for name, id in text.control.items()}
    ids = {f"{role}_token": section.values.get(f"{role}_token_id") for role in ("bos", "eos", "pad")}
    return {role: names[id] for role, id in ids.items() if isinstance(id, int) and id in names}


def _end_as_closed(section: Settings, template: ChatTemplate | None, text: JsonTextTokenizer | None) -> None:
    """Of several ends, puts that first with which the chat template closes what an assistant says: the model was taught
    to end its replies so, and the first ends them here. A template that does not tell leaves them as they are."""
    ends = section.values.get("eos_token_id")
    if template is None or text is None or not isinstance(ends, list):
        return
    try:
        closing = ChatRenderer(template, text).closing(ends)
    except OmniError as error:
        log.warning("%s: which of several eos_token_id closes a message is not known: %s", section.source, error)
        return
    if closing is not None:
        section.values["eos_token_id"] = [closing, *(end for end in ends if end != closing)]


def _preset(
    directory: epath.Path,
    family: Family,
    settings: Settings,
    config: TransformerConfig,
    text: PublicTextTokenizer | None,
) -> Preset:
    """The family's vocabulary and grammar, or this package's own where they lie there, as an export leaves them."""
    own = {name: directory / f"{name}.json" for name in ("vocabulary", "grammar")}
    found = {name: read_object(path, LARGEST_CHECKPOINT_CONFIG) for name, path in own.items() if path.exists()}
    if "vocabulary" not in found:
        preset = family.preset(settings, config, text)
        if "grammar" in found:
            return Preset(preset.vocabulary, found["grammar"])
        return dataclasses.replace(preset, declaration=with_file(preset.declaration, directory))
    if "grammar" not in found:
        raise OmniError(
            f"{own['grammar']}: no such file, without which {own['vocabulary'].name} says too little; add it"
        )
    vocabulary = Vocabulary.from_json(found["vocabulary"])
    if vocabulary.size < config.vocabulary_size:
        sizes = f"{vocabulary.size} ids, config.json {config.vocabulary_size}"
        raise OmniError(f"{own['vocabulary']} has {sizes}; they are of different models")
    return Preset(vocabulary, found["grammar"])


def _tokenizers(
    directory: epath.Path, family: Family, preset: Preset, inside: bool
) -> dict[str, omni_tokenizers.Tokenizer]:
    """Tokenizers, as far as they are there; this package's own go before those `inside` the weights."""
    modalities = preset.declaration["modalities"]
    own = {modality: directory / "tokenizers" / modality for modality in modalities}
    found = {modality: omni_tokenizers.load(path) for modality, path in own.items() if path.exists()}
    ids = preset.vocabulary.block(modalities["text"]["block"])
    if "text" not in found and (text := family.text(directory, ids)) is not None:
        found["text"] = text
    return family.tokenizers(directory) | found if inside and "image" not in found else found


def export_checkpoint(model: Model, directory: epath.PathLike, dtype: str = "float32") -> None:
    """Writes a model as a directory that transformers loads, and `load_checkpoint` again as the model that it is.

    The vocabulary, the grammar and what transformers has no place for (such as decoders of pictures) go beside it, in
    this package's own form, which transformers ignores.

    Args:
      dtype: type in which weights are stored: float32, float16 or bfloat16.

    Raises:
      OmniError: transformers has no such model.
    """
    family = _family_like(model)
    directory = epath.Path(directory)
    places, more = list(family.places(model.config, family.prefix)), family.more_tensors(model)
    shapes = their_shapes(model.transformer, places) | {name: value.shape for name, value in more.items()}
    tensors = itertools.chain(their_tensors(model.transformer, places), more.items())
    write_directory(directory, shapes, tensors, dtype)
    _write_json(directory / CHECKPOINT_CONFIG, family.write(model) | {"dtype": dtype})
    _write_json(directory / "vocabulary.json", model.vocabulary.to_json())
    _write_json(directory / "grammar.json", model.grammar.to_json())
    written = set()
    if model.generation:
        _write_json(directory / "generation.json", model.generation)
        written.add("generation.json")
    if (processor := model.processor.image_processor) is not None and family.image_processor_type is not None:
        values = {"image_processor_type": family.image_processor_type} | processor.to_json()
        _write_json(directory / PREPROCESSOR, values)
        written.add(PREPROCESSOR)
    for modality, tokenizer in model.tokenizers.items():
        if isinstance(tokenizer, PublicTextTokenizer):
            tokenizer.write_original(directory)
            written.add(tokenizer.file)
        elif modality not in family.carries(model):
            tokenizer.save(directory / "tokenizers" / modality)
            written.add(f"tokenizers/{modality}")
    if model.chat_template:
        model.chat_template.export(directory)
        written.add(SOURCE)
    _forget(directory, model.grammar.modalities, written)


def _forget(directory: epath.Path, modalities: Sequence[str], written: Collection[str]) -> None:
    """Takes away what lies there from an older export and would be read as this one's, which did not write it."""
    texts = itertools.takewhile(lambda name: name not in written, TEXT_FILES)  # what is written goes before the others
    for name in ("generation.json", PREPROCESSOR, SOURCE, *texts, *(f"tokenizers/{name}" for name in modalities)):
        if name not in written and (path := directory / name).exists():
            path.rmtree() if path.is_dir() else path.unlink()


def _family_like(model: Model) -> Family:
    """The family to which a model belongs by its configuration and its pieces."""
    lacks = [(family, family.lacks(model)) for family in FAMILIES]
    advice = ""
    if "image" in model.grammar.modalities and "image" not in model.tokenizers:
        advice = "; it came without its image tokenizer: add the directory tokenizers/image of the model it was before"
    for family, what in lacks:
        if what is None:
            if advice:
                log.warning("written as %s%s, to write it as that was", family.name, advice)
            return family
    reasons = ", ".join(f"{family.name} has no {what}" for family, what in lacks)
    raise OmniError(f"transformers has no model like this one: {reasons}{advice}")


def _write_json(path: epath.Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")
