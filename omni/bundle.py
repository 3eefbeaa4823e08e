"""A model with everything it needs, as one directory: the one place where all pieces meet.

model.json  weights.safetensors  vocabulary.json  grammar.json  generation.json  tokenizers/{text,image,audio,video}/
chat_template.jinja  chat_tokens.json
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float, Int

import omni_tokenizers
from omni.chat_template import SOURCE, ChatTemplate
from omni.generate import Engine, PreparedRequest
from omni.generate.programs import power_of_two
from omni.grammar import Grammar, Tokens
from omni.hub import located
from omni.interop import export_checkpoint, is_public, load_checkpoint
from omni.likelihood import document_losses
from omni.model import Transformer, VisionConfig, decoder_on, make_decoder
from omni.model.files import DESCRIPTION, load_transformer, save_transformer
from omni.model.quantized import check_dtype
from omni.parts import Part
from omni.processor import Processor
from omni.prompts import SETTINGS, Prompts, Request, listed
from omni.reply import Reply, make_replies
from omni.serving import Chat, Content, Server
from omni.sharding import MeshConfig, ShardingRules, make_mesh
from omni.stopping import StopStrings
from omni.streaming import SOUND_SECONDS, Event, EventStream
from omni.vocabulary import Vocabulary
from omni_tokenizers.errors import OmniError, UsageError

_SEEN = 16  # pictures that go through the tower together
MODELS = Path(__file__).parent / "recipes" / "models"


class Model:
    """A transformer, its vocabulary, grammar and tokenizers.

    Attributes:
      transformer: the network.
      context_length: most tokens of prompt and reply together.
      generation: default sampling settings, name -> modality -> value.
      chat_template: how it reads chats, None for turns of a document.
      weights_dtype, cache_dtype: what matrices, and keys and values, are held in while replies are generated (float32,
        bfloat16 or int8); None for the compute type.
    """

    def __init__(
        self,
        transformer: Transformer,
        vocabulary: Vocabulary,
        grammar: Grammar,
        tokenizers: Mapping[str, omni_tokenizers.Tokenizer],
        *,
        context_length: int,
        generation: Mapping[str, Mapping[str, float]] | None = None,
        chat_template: ChatTemplate | None = None,
        mesh: Mesh | None = None,
        weights_dtype: str | None = None,
        cache_dtype: str | None = None,
    ):
        """A model of these pieces; `mesh` is where the transformer lies, None for one device."""
        check_dtype("weights_dtype", weights_dtype)
        check_dtype("cache_dtype", cache_dtype)
        if transformer.config.vocabulary_size != vocabulary.size:
            raise OmniError(
                f"the transformer has {transformer.config.vocabulary_size} ids, its vocabulary.json {vocabulary.size}"
            )
        self.transformer, self.vocabulary, self.grammar = transformer, vocabulary, grammar
        see = functools.partial(_see, transformer) if transformer.config.vision else None
        self.processor = Processor(vocabulary, grammar, tokenizers, see)
        if transformer.config.vision:
            _check_seen(transformer.config.vision, self.processor)
        self.context_length, self.mesh = context_length, mesh
        self.weights_dtype, self.cache_dtype = weights_dtype, cache_dtype
        self.generation, self.chat_template = dict(generation or {}), chat_template
        if unknown := set(self.generation) - set(SETTINGS):
            raise OmniError(f"generation.json: unknown setting {sorted(unknown)}; settings are {sorted(SETTINGS)}")

    @property
    def tokenizers(self) -> dict[str, omni_tokenizers.Tokenizer]:
        """Tokenizer of each modality."""
        return self.processor.tokenizers

    @property
    def config(self):
        """The transformer's configuration."""
        return self.transformer.config

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(self.transformer, nnx.Param)))
        return f"Model({', '.join(self.grammar.modalities)}; {count / 1e6:.1f} million parameters)"

    # Files

    @classmethod
    def load(
        cls,
        directory: epath.PathLike,
        mesh: Mesh | None = None,
        *,
        weights_dtype: str | None = None,
        cache_dtype: str | None = None,
    ) -> Model:
        """Reads a directory written by `save`; `OmniError` says what is missing, damaged or does not fit."""
        directory = epath.Path(directory)
        transformer, context_length, belongs_to = load_transformer(directory, mesh)
        vocabulary = Vocabulary.from_json(_read_json(directory / "vocabulary.json"))
        grammar = Grammar(_read_json(directory / "grammar.json"), vocabulary)
        tokenizers = {
            modality: omni_tokenizers.load(directory / "tokenizers" / modality)
            for modality in grammar.modalities
            if (directory / "tokenizers" / modality).exists()
        }
        settings = directory / "generation.json"
        generation = _read_json(settings) if settings.exists() else None
        pieces = (transformer, vocabulary, grammar, tokenizers)
        more = {"generation": generation, "chat_template": ChatTemplate.load(directory), "mesh": mesh}
        held = {"weights_dtype": weights_dtype, "cache_dtype": cache_dtype}
        model = cls(*pieces, context_length=context_length, **more, **held)
        found = {"vocabulary": vocabulary.hash, "grammar": grammar.hash}
        for name, hash in (found | {name: each.hash for name, each in tokenizers.items()}).items():
            if belongs_to.get(name, hash) != hash:
                raise OmniError(f"{directory}: made with another {name} ({belongs_to[name]}) than lies there ({hash})")
        return model

    def save(self, directory: epath.PathLike, *, dtype: str = "float32") -> None:
        """Writes everything; `dtype` is the type in which weights are stored (float32, float16, bfloat16)."""
        directory = epath.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        _write_json(directory / "vocabulary.json", self.vocabulary.to_json())
        _write_json(directory / "grammar.json", self.grammar.to_json())
        _write_json(directory / "generation.json", self.generation)
        if self.chat_template:
            self.chat_template.save(directory)
        else:
            (directory / SOURCE).unlink(missing_ok=True)  # one of another model would be read as this one's
        belongs_to = {"vocabulary": self.vocabulary.hash, "grammar": self.grammar.hash}
        for modality, tokenizer in self.tokenizers.items():
            options = {} if modality == "text" else {"dtype": dtype}
            tokenizer.save(directory / "tokenizers" / modality, **options)
            belongs_to[modality] = omni_tokenizers.load(directory / "tokenizers" / modality).hash  # of rounded weights
        length = self.context_length
        save_transformer(directory, self.transformer, context_length=length, belongs_to=belongs_to, dtype=dtype)

    def export(self, directory: epath.PathLike, *, dtype: str = "float32") -> None:
        """Writes a directory that transformers loads; see `omni.interop.export_checkpoint` for details and errors."""
        export_checkpoint(self, directory, dtype)

    # Generation

    @functools.cached_property
    def engine(self) -> Engine:
        """The batched engine over unstacked weights."""
        mesh, model, dtype = self.mesh, self.transformer, self.weights_dtype
        decoder = make_decoder(model, dtype) if mesh is None else decoder_on(mesh, ShardingRules(), model, dtype)
        context = self.context_length
        return Engine(decoder, self.grammar, context=context, mesh=mesh, cache_dtype=self.cache_dtype)

    def generate(
        self, parts: Sequence[Part | str], want: Sequence[str] | None = None, **settings
    ) -> Reply | list[Reply]:
        """Answers one prompt; `settings` are the other fields of `Request`.

        Returns:
          The reply; where `samples` is given, a list of so many.

        Raises:
          UsageError: for a wrong argument.
          OmniError: for a prompt that the model cannot read.
        """
        replies = self.generate_batch([Request(parts, want, **settings)])
        return replies if "samples" in settings else replies[0]

    def generate_batch(self, requests: Sequence[Request]) -> list[Reply]:
        """Answers any mix of requests together; replies in their order, each one's samples one after the other.

        Errors as in `generate`.
        """
        generated = self.engine.generate(self.prepare(requests))
        stops = [StopStrings(request.stop or ()) for request in requests for _ in range(request.samples)]
        return make_replies(self.processor, generated, stops)

    def stream(
        self,
        parts: Sequence[Part | str],
        want: Sequence[str] | None = None,
        *,
        picture_rows: int = 0,
        sound_seconds: float = SOUND_SECONDS,
        **settings,
    ) -> Iterator[Event]:
        """Answers one prompt as events in order (`omni.streaming.Event`); the last one holds the whole reply.

        Args:
          picture_rows: rows of codes after which a picture is shown as far as it is drawn; 0 for whole pictures alone.
          sound_seconds: least length of the pieces in which a causal codec gives sound; 0 for whole sounds alone.
          parts, want, settings: as of `generate`.
        """
        request = Request(parts, want, **settings)
        if request.samples != 1:
            raise UsageError("a stream gives one reply; call generate for several samples")
        pieces = {"picture_rows": picture_rows, "sound_seconds": sound_seconds}
        events = EventStream(self.processor, StopStrings(request.stop or ()), **pieces)
        hops = self.engine.stream(self.prepare([request]), events.hop)
        return (event for hop in hops for progress in hop for event in events.of(progress))

    def serve(self, slots: int, *, capacity: int | None = None, shadows: int | None = None) -> Server:
        """A running batch that requests join at any time; see `omni.serving.Server` and `omni.generate.Engine.open`."""
        return Server(self, slots, capacity=capacity, shadows=shadows)

    def chat(self, system: Content = (), *, capacity: int | None = None) -> Chat:
        """A conversation; see `omni.serving.Chat`."""
        return Chat(self, system, capacity=capacity)

    def prepare(self, requests: Sequence[Request]) -> list[PreparedRequest]:
        """Requests as the engine takes them, each as many times as it asks for samples."""
        return self.prompts.prepare(requests)

    @functools.cached_property
    def prompts(self) -> Prompts:
        """What makes prompts of requests."""
        return Prompts(self.processor, self.context_length, self.generation, self.chat_template)

    # The pieces

    def encode(self, parts: Sequence[Part | str]) -> Int[np.ndarray, " tokens"]:
        """Ids of a whole document; parts marked `context` come before the turn."""
        return self.processor.tokens([self.processor.part(part) for part in listed(parts)]).ids

    def decode(self, ids: Int[np.ndarray, " tokens"]) -> list[Part]:
        """Parts of a document's ids; `GrammarError` where they are not one."""
        return self.processor.parts([self.grammar.parse(ids)])[0]

    def logits(
        self, ids: Int[np.ndarray, "batch length"], features: Float[np.ndarray, "features dim"] | None = None
    ) -> Float[np.ndarray, "batch length vocabulary"]:
        """Float32 logits for the token after each id; every row is one document without padding.

        Args:
          features: what stands at the places that ids have for features, in order (`PreparedRequest.features`); by
            default the embedding of what marks these places.

        Raises:
          UsageError: if `ids` is not a matrix of ids of the vocabulary, or there are other features than places.
        """
        ids = np.asarray(ids)
        in_range = ids.size == 0 or 0 <= ids.min() <= ids.max() < self.vocabulary.size
        if ids.ndim != 2 or ids.dtype.kind not in "iu" or not in_range:
            raise UsageError(f"logits takes integer ids [batch, length] in 0..{self.vocabulary.size - 1}")
        index = np.arange(ids.shape[1])
        positions = np.stack([self.grammar.positions(self._states(row), index) for row in ids])
        ids, given = (ids, None) if features is None else self._with_features(ids, features)
        return np.asarray(_logits(self.transformer, jnp.asarray(ids, jnp.int32), jnp.asarray(positions), given))

    def _with_features(self, ids: Int[np.ndarray, "batch length"], features: Float[np.ndarray, "features dim"]):
        """Ids that are negative where features stand, and for each what stands there: [batch, length, dim]."""
        flat, dim, features = ids.reshape(-1).copy(), self.config.dim, np.asarray(features)
        places = self.grammar.feature_places(flat)
        if features.shape != (len(places), dim):
            raise UsageError(f"logits has places for features [{len(places)}, {dim}], not {list(features.shape)}")
        given = np.zeros((len(flat), dim), np.float32)
        flat[places], given[places] = -1, features
        return flat.reshape(ids.shape), given.reshape(*ids.shape, dim)

    def token_losses(self, documents: Sequence[Tokens]) -> list[Float[np.ndarray, " tokens"]]:
        """Nats that each token of each document costs after those before it; 0 for the first. Batched, exact."""
        return document_losses(self.transformer, self.grammar, documents)

    def _states(self, ids: Int[np.ndarray, " tokens"]) -> Int[np.ndarray, " tokens"]:
        """States for positions; ids that are no document (a test, a fragment) count as text."""
        try:
            return self.grammar.annotate(ids)
        except OmniError:
            return np.full(len(ids), self.grammar.tables.after_text)


@nnx.jit
def _logits(transformer: Transformer, ids, positions, given):
    return transformer(ids, positions, None, given=given)


def _see(
    transformer: Transformer, values: Float[np.ndarray, "pictures side side 3"]
) -> Float[np.ndarray, "pictures features dim"]:
    """Features of any number of pictures, in batches of few sizes."""
    found = []
    for start in range(0, len(values), _SEEN):
        batch = values[start : start + _SEEN]
        padding = power_of_two(len(batch)) - len(batch)
        seen = _features(transformer, np.pad(batch, ((0, padding), (0, 0), (0, 0), (0, 0))))
        found.append(np.asarray(seen[: len(batch)], np.float32))
    return np.concatenate(found)


def _check_seen(vision: VisionConfig, processor: Processor) -> None:
    """Raises `OmniError` where the grammar's features are not of pictures that the tower sees."""
    layout, scaling = processor.grammar.layouts.get("image"), processor.image_processor
    if not layout or not layout.seen:
        return
    side, count = scaling.side if scaling else 0, layout.seen.count(layout.feature)
    if (side, count) != (vision.image_size, vision.tokens):
        raise OmniError(
            f"grammar: images have {count} features and a preprocessing to {side} pixels a side; the tower makes "
            f"{vision.tokens} of {vision.image_size}"
        )


@nnx.jit
def _features(transformer: Transformer, values):
    return transformer.vision(values)


def load(
    name: epath.PathLike,
    mesh: MeshConfig | None = None,
    dtype: str = "float32",
    *,
    weights_dtype: str | None = None,
    cache_dtype: str | None = None,
    torch_reader: bool = False,
) -> Model:
    """Opens a model: the name of one that came with the package, a run, a directory of `Model.save`, or a public
    checkpoint's directory (docs/checkpoints.md, `omni.interop.load_checkpoint`) or repository (`omni.hub.located`).

    A directory that holds a model goes before a model in the box of the same name, any other directory does not.

    Args:
      mesh: how the transformer lies on this machine's devices, as for a training: `MeshConfig(tensor=4)` splits its
        layers over four and requests over what is left. Without it, one device holds and does everything.
      dtype: type in which a public checkpoint's matrices are kept and its activations computed, float32 or bfloat16.
      weights_dtype: type in which matrices are held while replies are generated: float32, bfloat16 or int8 (package
        qwix), by default that in which they are computed with. `logits` and `token_losses` know nothing of it.
      cache_dtype: the same of keys and values of what was read.
      torch_reader: whether to read a public checkpoint in PyTorch's format with torch's weights_only reader.

    Raises:
      UsageError: the mesh does not fit the devices, there is no such type, or a dtype for what is no public checkpoint.
      OmniError: if there is no model of that name, or its files are damaged; says what is missing.
    """
    boxed = sorted(path.name for path in MODELS.glob("*/"))
    directory = located(name)
    if os.fspath(name) in boxed and not (directory / DESCRIPTION).exists():
        directory = epath.Path(MODELS / name)
    if not directory.exists():
        known = ", ".join(boxed) or "none"
        raise OmniError(f"{name}: no such directory, nor a model in the box (there is: {known})")
    devices = None if mesh is None else make_mesh(mesh)
    held = {"weights_dtype": weights_dtype, "cache_dtype": cache_dtype}
    if (directory / DESCRIPTION).exists():
        if dtype != "float32":
            raise UsageError(f"{directory}: dtype is for public checkpoints; a model's own is in its {DESCRIPTION}")
        return Model.load(directory, devices, **held)
    if not is_public(directory):
        raise OmniError(f"{directory}: not a run or a model: it holds no {DESCRIPTION}, nor a public checkpoint")
    return Model(**vars(load_checkpoint(directory, devices, dtype, torch_reader)), mesh=devices, **held)


def _read_json(path: epath.Path) -> dict:
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise OmniError(f"{path}: no such file") from None
    except ValueError as error:
        raise OmniError(f"{path}: not JSON ({error})") from None
    if not isinstance(data, dict):
        raise OmniError(f"{path}: not a JSON object")
    return data


def _write_json(path: epath.Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


__all__ = ["Model", "load"]
