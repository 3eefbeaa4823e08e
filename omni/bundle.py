"""A model with everything it needs, as one directory: the one place where all pieces meet.

model.json  weights.safetensors  vocabulary.json  grammar.json  generation.json  tokenizers/{text,image,audio,video}/
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float, Int

import omni_tokenizers
from omni.generate import Engine, PreparedRequest, guidance_shadows, per_modality, wanted_modalities
from omni.grammar import Grammar, Span, Tokens
from omni.interop import export_checkpoint, is_public, load_checkpoint
from omni.likelihood import document_losses
from omni.model import Transformer, decoder_on, make_decoder
from omni.model.files import DESCRIPTION, load_transformer, save_transformer
from omni.parts import Part, as_part
from omni.processor import Processor
from omni.reply import Event, Reply, events, make_replies, stop_place
from omni.sharding import MeshConfig, ShardingRules, make_mesh
from omni.stopping import StopStrings
from omni.vocabulary import Vocabulary
from omni_tokenizers.errors import OmniError, UsageError

Setting = float | Mapping[str, float]

MODELS = Path(__file__).parent / "recipes" / "models"
_TEXT_ALLOWANCE = 32  # tokens set aside for a text part when the length of a reply is not given


@dataclass(frozen=True)
class Request:
    """What to answer, and how. Settings left at None are the model's own (`generation.json`).

    Attributes:
      parts: the prompt: strings, parts, pictures, paths (see `omni.parts.as_part`).
      want: modalities of the reply's parts, in order; None leaves them to the model.
      seed: same seed, same reply, whatever else is in the batch.
      max_tokens: most tokens of the reply; by default the longest picture, sound or video and 32 tokens of text for
        each that is wanted, or the rest of the context.
      temperature, top_k, top_p, min_p, repetition_penalty, guidance: one number, or modality -> number.
      media_guidance: weight of the prompt's pictures, sounds and videos without its text, which `guidance` then weighs
        against these instead of against nothing (`omni.generate.guidance_shadows`); by default as much as that.
      constrained: whether only well-formed replies can come.
      log_probabilities: whether the reply holds them (`Reply.log_probabilities`); a stream does not.
      stop: strings of which the first that appears in a text of the reply ends the reply. The text is cut before it;
        the ids go on to the token that completed it.
      stop_tokens: ids of which the first that comes ends the reply, and is its last; within a picture, sound or video,
        which is finished, they end nothing.
      samples: how many replies, with the seeds seed, seed + 1, ...; the prompt is read once.
    """

    parts: Sequence[Part | str]
    want: Sequence[str] | None = None
    seed: int = 0
    max_tokens: int | None = None
    temperature: Setting | None = None
    top_k: Setting | None = None
    top_p: Setting | None = None
    min_p: Setting | None = None
    repetition_penalty: Setting | None = None
    guidance: Setting | None = None
    media_guidance: Setting | None = None
    constrained: bool = True
    log_probabilities: bool = False
    stop: Sequence[str] = ()
    stop_tokens: Sequence[int] = ()
    samples: int = 1


_NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "guidance": 1.0}
_SETTINGS = (*_NEUTRAL, "media_guidance")


class Model:
    """A transformer, its vocabulary, grammar and tokenizers.

    Attributes:
      transformer: the network.
      context_length: most tokens of prompt and reply together.
      generation: default sampling settings, name -> modality -> value.
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
        mesh: Mesh | None = None,
    ):
        """A model of these pieces; `mesh` is where the transformer lies, None for one device."""
        if transformer.config.vocabulary_size != vocabulary.size:
            raise OmniError(
                f"the transformer has {transformer.config.vocabulary_size} ids, its vocabulary.json {vocabulary.size}"
            )
        self.transformer, self.vocabulary, self.grammar = transformer, vocabulary, grammar
        self.processor = Processor(vocabulary, grammar, tokenizers)
        self.context_length, self.mesh = context_length, mesh
        self.generation = dict(generation or {})
        if unknown := set(self.generation) - set(_SETTINGS):
            raise OmniError(f"generation.json: unknown setting {sorted(unknown)}; settings are {sorted(_SETTINGS)}")

    @property
    def tokenizers(self) -> dict[str, omni_tokenizers.Tokenizer]:
        """Tokenizer of each modality."""
        return self.processor.tokenizers

    @property
    def config(self):
        """The transformer's configuration."""
        return self.transformer.config

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.engine.decoder))
        return f"Model({', '.join(self.grammar.modalities)}; {count / 1e6:.1f} million parameters)"

    # Files

    @classmethod
    def load(cls, directory: epath.PathLike, mesh: Mesh | None = None) -> Model:
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
        model = cls(*pieces, context_length=context_length, generation=generation, mesh=mesh)
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
        mesh, model = self.mesh, self.transformer
        decoder = make_decoder(model) if mesh is None else decoder_on(mesh, ShardingRules(), model)
        return Engine(decoder, self.grammar, context=self.context_length, mesh=mesh)

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
        stops = [StopStrings(request.stop) for request in requests for _ in range(request.samples)]
        return make_replies(self.processor, generated, stops)

    def stream(self, parts: Sequence[Part | str], want: Sequence[str] | None = None, **settings) -> Iterator[Event]:
        """Answers one prompt as events in order: pieces of text, whole parts, the end. Arguments as in `generate`."""
        request = Request(parts, want, **settings)
        if request.log_probabilities or request.samples != 1:
            raise UsageError("a stream gives one reply, without log-probabilities; call generate for more")
        prepared = self.prepare([request])
        hops = self.engine.stream(prepared, hop=4)
        return events(self.processor, (ids for hop in hops for _, ids in hop), StopStrings(request.stop))

    def prepare(self, requests: Sequence[Request]) -> list[PreparedRequest]:
        """Requests as the engine takes them, each as many times as it asks for samples."""
        documents = [[self._part(part) for part in _listed(request.parts)] for request in requests]
        spans = self.processor.spans(documents)
        prepared = [self._prepare(request, own) for request, own in zip(requests, spans, strict=True)]
        return [
            dataclasses.replace(each, seed=each.seed + sample)
            for request, each in zip(requests, prepared, strict=True)
            for sample in range(request.samples)
        ]

    def _part(self, value) -> Part:
        """What stands for a part as one; of a video file only the frames that the model sees are read."""
        return self.processor.read(value) if isinstance(value, os.PathLike) else as_part(value)

    def _prepare(self, request: Request, prompt: Sequence[Span]) -> PreparedRequest:
        grammar = self.grammar
        if not _is_integer(request.samples) or request.samples < 1:
            raise UsageError(f"samples is {request.samples!r}; it must be a whole number, at least 1")
        if isinstance(request.stop_tokens, str) or not all(map(_is_integer, request.stop_tokens)):
            raise UsageError(f"stop_tokens is a list of ids, not {request.stop_tokens!r}")
        stop = StopStrings(request.stop)
        settings = {name: self._setting(request, name, neutral) for name, neutral in _NEUTRAL.items()}
        guidance = settings["guidance"]
        prompts = [prompt, [span for span in prompt if span.modality != "text"], []]
        ids, media, nothing = (grammar.prompt(spans) for spans in prompts)
        want = wanted_modalities(grammar, request.want)
        return PreparedRequest(
            ids=ids,
            max_tokens=self._reply_length(want, len(ids)) if request.max_tokens is None else request.max_tokens,
            temperature=settings["temperature"],
            top_k=settings["top_k"].astype(np.int32),
            top_p=settings["top_p"],
            min_p=settings["min_p"],
            repetition_penalty=settings["repetition_penalty"],
            want=want,
            seed=request.seed,
            constrained=request.constrained,
            log_probabilities=request.log_probabilities,
            stop_tokens=tuple(request.stop_tokens),
            stop=functools.partial(stop_place, self.processor, stop) if stop.strings else None,
            shadows=guidance_shadows(ids, media, nothing, guidance, self._setting(request, "media_guidance", guidance)),
        )

    def _setting(
        self, request: Request, name: str, default: float | Float[np.ndarray, " modalities"]
    ) -> Float[np.ndarray, " modalities"]:
        """A setting by modality: the request's own, else the model's, else the default."""
        own, chosen = self.generation.get(name, {}), getattr(request, name)
        if isinstance(chosen, Mapping):
            chosen = {**own, **chosen}
        return per_modality(self.grammar, own if chosen is None else chosen, default, name)

    def _reply_length(self, want: tuple[int, ...] | None, prompt_length: int) -> int:
        room = self.context_length - prompt_length
        if room < (1 if want is None else int(self.grammar.tables.minimum[list(want)].sum()) + 1):
            raise OmniError(
                f"the prompt has {prompt_length} tokens, the model reads at most {self.context_length} with its reply"
            )
        if want is None:
            return room
        longest = [_TEXT_ALLOWANCE, *(max(layout.by_length) for layout in self.grammar.layouts.values())]
        return min(room, sum(longest[modality] for modality in want) + 1)

    # The pieces

    def encode(self, parts: Sequence[Part | str]) -> Int[np.ndarray, " tokens"]:
        """Ids of a whole document; parts marked `context` come before the turn."""
        return self.processor.tokens([self._part(part) for part in _listed(parts)]).ids

    def decode(self, ids: Int[np.ndarray, " tokens"]) -> list[Part]:
        """Parts of a document's ids; `GrammarError` where they are not one."""
        return self.processor.parts([self.grammar.parse(ids)])[0]

    def logits(self, ids: Int[np.ndarray, "batch length"]) -> Float[np.ndarray, "batch length vocabulary"]:
        """Float32 logits for the token after each id; every row is one document without padding.

        Raises:
          UsageError: if `ids` is not a matrix of ids of the vocabulary.
        """
        ids = np.asarray(ids)
        in_range = ids.size == 0 or 0 <= ids.min() <= ids.max() < self.vocabulary.size
        if ids.ndim != 2 or ids.dtype.kind not in "iu" or not in_range:
            raise UsageError(f"logits takes integer ids [batch, length] in 0..{self.vocabulary.size - 1}")
        index = np.arange(ids.shape[1])
        positions = np.stack([self.grammar.positions(self._states(row), index) for row in ids])
        return np.asarray(_logits(self.transformer, jnp.asarray(ids, jnp.int32), jnp.asarray(positions)))

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
def _logits(transformer: Transformer, ids, positions):
    return transformer(ids, positions, None)


def load(
    name: epath.PathLike, mesh: MeshConfig | None = None, dtype: str = "float32", *, torch_reader: bool = False
) -> Model:
    """Opens a model: the name of one that came with the package, a run, a directory of `Model.save`, or a public
    checkpoint's directory (docs/checkpoints.md, `omni.interop.load_checkpoint`).

    A directory that holds a model goes before a model in the box of the same name, any other directory does not.

    Args:
      mesh: how the transformer lies on this machine's devices, as for a training: `MeshConfig(tensor=4)` splits its
        layers over four and requests over what is left. Without it, one device holds and does everything.
      dtype: type in which a public checkpoint's matrices are kept and its activations computed, float32 or bfloat16.
      torch_reader: whether to read a public checkpoint in PyTorch's format with torch's weights_only reader.

    Raises:
      UsageError: the mesh does not fit the devices, or a dtype for what is no public checkpoint.
      OmniError: if there is no model of that name, or its files are damaged; says what is missing.
    """
    boxed = sorted(path.name for path in MODELS.glob("*/"))
    directory = epath.Path(name)
    if name in boxed and not (directory / DESCRIPTION).exists():
        directory = epath.Path(MODELS / name)
    if not directory.exists():
        known = ", ".join(boxed) or "none"
        raise OmniError(f"{name}: no such directory, nor a model in the box (there is: {known})")
    devices = None if mesh is None else make_mesh(mesh)
    if (directory / DESCRIPTION).exists():
        if dtype != "float32":
            raise UsageError(f"{directory}: dtype is for public checkpoints; a model's own is in its {DESCRIPTION}")
        return Model.load(directory, devices)
    if not is_public(directory):
        raise OmniError(f"{directory}: not a run or a model: it holds no {DESCRIPTION}, nor a public checkpoint")
    return Model(**vars(load_checkpoint(directory, devices, dtype, torch_reader)), mesh=devices)


def _is_integer(value) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _listed(parts) -> Sequence:
    if isinstance(parts, (str, bytes)) or not isinstance(parts, Sequence):
        raise UsageError(f"a prompt is a list of parts, not {type(parts).__name__}: write ['seven']")
    return parts


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


__all__ = ["Model", "Request", "load"]
