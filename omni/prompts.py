"""What a model is asked, and how it becomes ids."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from omni.chat_template import ChatRenderer, ChatTemplate, MediaPlaceholder
from omni.generate import (
    PreparedRequest,
    Shadow,
    guidance_shadows,
    is_whole,
    per_modality,
    unconditional_shadow,
    wanted_modalities,
)
from omni.grammar import Grammar, Span
from omni.messages import Message, are_messages, read_messages
from omni.parts import Part
from omni.processor import Processor, given
from omni.reply import stop_place
from omni.stopping import StopStrings
from omni_tokenizers.errors import OmniError, UsageError
from omni_tokenizers.text_json import JsonTextTokenizer

Setting = float | Mapping[str, float]

_TEXT_ALLOWANCE = 32  # tokens set aside for a text part when the length of a reply is not given
_NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "guidance": 1.0}
SETTINGS = (*_NEUTRAL, "media_guidance")
"""Names of the settings that a model may have defaults for."""


@dataclass(frozen=True)
class Request:
    """What to answer, and how. Settings left at None are the model's own (`generation.json`).

    Attributes:
      parts: the prompt: strings, parts, pictures, paths (see `omni.parts.as_part`); or the messages of a chat (see
        `omni.messages.read_messages`), which the reply answers.
      want: modalities of the reply's parts, in order; None leaves them to the model.
      seed: same seed, same reply, whatever else is in the batch.
      max_tokens: most tokens of the reply; by default the longest picture, sound or video and 32 tokens of text for
        each that is wanted, or the rest of the context.
      temperature, top_k, top_p, min_p, repetition_penalty, guidance: one number, or modality -> number.
      media_guidance: weight of the prompt's pictures, sounds and videos without its text, which `guidance` then weighs
        against these instead of against nothing (`omni.generate.guidance_shadows`); by default as much as that.
      constrained: whether only well-formed replies can come.
      log_probabilities: whether the reply holds them (`Reply.log_probabilities`).
      stop: strings of which the first that appears in a text of the reply ends the reply. The text is cut before it;
        the ids go on to the token that completed it.
      stop_tokens: ids of which the first that comes ends the reply, and is its last; within a picture, sound or video,
        which is finished, they end nothing.
      samples: how many replies, with the seeds seed, seed + 1, ...; the prompt is read once.
    """

    parts: Sequence[Part | str] | Sequence[Message | Mapping]
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


@dataclass(frozen=True, eq=False)
class Turn:
    """What one side said.

    Attributes:
      role: who it was, as in `Message`; None of a prompt that is no chat.
      parts: what it said, in order.
      spans: the codes of each part.
    """

    role: str | None
    parts: tuple[Part, ...]
    spans: tuple[Span, ...]

    @property
    def without_text(self) -> Turn:
        """Its pictures, sounds and videos alone."""
        kept = [i for i, span in enumerate(self.spans) if span.modality != "text"]
        return Turn(self.role, tuple(self.parts[i] for i in kept), tuple(self.spans[i] for i in kept))


class Prompts:
    """Makes of requests what the engine takes."""

    def __init__(
        self,
        processor: Processor,
        context_length: int,
        generation: Mapping[str, Mapping[str, float]],
        chat_template: ChatTemplate | None = None,
    ):
        """Of a model with this context and these defaults, name of a setting -> modality -> value, which reads chats as
        the template writes them; without one, as turns of a document."""
        self.processor, self.grammar = processor, processor.grammar
        self.context_length, self.generation, self.chat_template = context_length, generation, chat_template

    def prepare(self, requests: Sequence[Request]) -> list[PreparedRequest]:
        """Each request as many times as it asks for samples.

        Raises:
          UsageError: for a wrong argument.
          OmniError: for a prompt that the model cannot read.
        """
        prepared = []
        for request, turns in zip(requests, self.turns(requests), strict=True):
            each = self.of_turns(request, turns)
            prepared += [dataclasses.replace(each, seed=each.seed + sample) for sample in range(request.samples)]
        return prepared

    def turns(self, requests: Sequence[Request]) -> list[list[Turn]]:
        """What each side says in each request; errors as of `prepare`."""
        chats = [[(role, given(parts)) for role, parts in self._said(request.parts)] for request in requests]
        spans = iter(self.processor.spans([parts for chat in chats for _, parts in chat], prompts=True))
        return [[Turn(role, tuple(parts), tuple(next(spans))) for role, parts in chat] for chat in chats]

    def _said(self, prompt: Sequence) -> list[tuple[str | None, Sequence[Part]]]:
        """Who says what in a prompt."""
        if not are_messages(prompt):
            return [(None, [self.processor.part(part) for part in listed(prompt)])]
        return [(message.role, message.parts) for message in read_messages(prompt, self.processor.part)]

    def of_turns(self, request: Request, turns: Sequence[Turn], room: int | None = None) -> PreparedRequest:
        """A request whose prompt these turns are; errors as of `prepare`.

        Args:
          room: tokens of prompt and reply that there is room for, if less than the context; a reply whose length is not
            given takes no more.
        """
        grammar = self.grammar
        if not is_whole(request.samples) or request.samples < 1:
            raise UsageError(f"samples is {request.samples!r}; it must be a whole number, at least 1")
        if isinstance(request.stop_tokens, str) or not all(map(is_whole, request.stop_tokens or ())):
            raise UsageError(f"stop_tokens is a list of ids, not {request.stop_tokens!r}")
        stop, stop_tokens = StopStrings(request.stop or ()), tuple(request.stop_tokens or ())
        settings = {name: self._setting(request, name, neutral) for name, neutral in _NEUTRAL.items()}
        ids = self._ids(turns)
        want = wanted_modalities(grammar, request.want)
        return PreparedRequest(
            ids=ids,
            max_tokens=self._reply_length(want, len(ids), room) if request.max_tokens is None else request.max_tokens,
            temperature=settings["temperature"],
            top_k=settings["top_k"].astype(np.int32),
            top_p=settings["top_p"],
            min_p=settings["min_p"],
            repetition_penalty=settings["repetition_penalty"],
            want=want,
            seed=request.seed,
            constrained=request.constrained,
            log_probabilities=request.log_probabilities,
            stop_tokens=stop_tokens,
            stop=functools.partial(stop_place, self.processor, stop) if stop.strings else None,
            shadows=self._shadows(request, turns, ids, want, settings["guidance"]),
            features=_features(turns, self.grammar, ids),
            is_chat=self._is_chat(turns),
        )

    def _shadows(
        self,
        request: Request,
        turns: Sequence[Turn],
        ids: Int[np.ndarray, " tokens"],
        want: tuple[int, ...] | None,
        guidance: Float[np.ndarray, " modalities"],
    ) -> tuple[Shadow, ...]:
        """Those that weigh something where the reply may be; no other is written, as a template may refuse it."""
        padded = self.grammar.unconditional == "padded"
        media_guidance = self._setting(request, "media_guidance", guidance)
        if want is not None:
            reached = np.isin(np.arange(len(guidance)), [0, *want])
            guidance, media_guidance = (np.where(reached, each, np.float32(1)) for each in (guidance, media_guidance))
        without_text = [turn.without_text for turn in turns]
        empty = [Turn("user" if self._is_chat(turns) else None, (), ())]

        def nothing() -> Int[np.ndarray, " tokens"]:
            return self.grammar.padded(ids) if padded else self._shadow_ids(empty)

        if np.array_equal(guidance, media_guidance) or not any(turn.spans for turn in without_text):
            shadows = () if (guidance == 1).all() else unconditional_shadow(nothing(), guidance)
        else:
            unweighed = ids[:0] if (media_guidance == 1).all() else nothing()
            shadows = guidance_shadows(ids, self._shadow_ids(without_text), unweighed, guidance, media_guidance)
        return tuple(
            dataclasses.replace(each, features=_features(turns, self.grammar, each.ids), is_chat=padded)
            for each in shadows
        )

    def _shadow_ids(self, turns: Sequence[Turn]) -> Int[np.ndarray, " tokens"]:
        try:
            return self._ids(turns)
        except OmniError as error:
            message = "guidance and media_guidance weigh against a prompt without what was said; 1 asks for none"
            raise OmniError(f"{error} ({message})") from None

    # Ids

    def _is_chat(self, turns: Sequence[Turn]) -> bool:
        """Whether the model's template writes these."""
        return self.chat_template is not None and turns[0].role is not None

    def _ids(self, turns: Sequence[Turn]) -> Int[np.ndarray, " tokens"]:
        """The prompt: a chat by the template, if there is one, else a document in turns, in which what the system says
        stands before what the first user does."""
        if self._is_chat(turns):
            return self._chat_ids(turns)
        spans = [turn.spans for turn in turns]
        return self.grammar.conversation([spans[0] + spans[1], *spans[2:]] if turns[0].role == "system" else spans)

    def _chat_ids(self, turns: Sequence[Turn]) -> Int[np.ndarray, " tokens"]:
        grammar, tokenizer = self.grammar, self.processor.tokenizer("text")
        pieces = self._renderer.pieces([Message(turn.role, turn.parts) for turn in turns])
        spans = [span for turn in turns for span in turn.spans]
        given = {name: [span for span in spans if span.modality == name] for name in grammar.modalities[1:]}
        for name, parts in given.items():
            if (places := pieces.count(MediaPlaceholder(name))) != len(parts):
                raise OmniError(f"the messages hold {name} {len(parts)} times, and the chat template shows {places}")
        following = {name: iter(parts) for name, parts in given.items()}
        between = [  # control tokens and parts, which text stands around
            np.array([piece], np.int32) if isinstance(piece, int) else grammar.span_ids(next(following[piece.modality]))
            for piece in pieces
            if not isinstance(piece, str)
        ]
        openings = (int(ids[0]) for ids in between)
        stretches = tokenizer.encode_between([each if isinstance(each, str) else next(openings) for each in pieces])
        first, *rest = (grammar.span_ids(Span("text", codes)) for codes in stretches)
        return np.concatenate([first, *(ids for pair in zip(between, rest, strict=True) for ids in pair)])

    @functools.cached_property
    def _renderer(self) -> ChatRenderer:
        tokenizer = self.processor.tokenizer("text")
        if not isinstance(tokenizer, JsonTextTokenizer):
            raise OmniError(
                "a chat template needs a text tokenizer that is a tokenizer.json, and this model has none: add "
                "tokenizer.json to the checkpoint, or remove its chat template"
            )
        return ChatRenderer(self.chat_template, tokenizer, self.grammar.modalities[1:])

    def _setting(
        self, request: Request, name: str, default: float | Float[np.ndarray, " modalities"]
    ) -> Float[np.ndarray, " modalities"]:
        """A setting by modality: the request's own, else the model's, else the default."""
        own, chosen = self.generation.get(name, {}), getattr(request, name)
        if isinstance(chosen, Mapping):
            chosen = {**own, **chosen}
        return per_modality(self.grammar, own if chosen is None else chosen, default, name)

    def _reply_length(self, want: tuple[int, ...] | None, prompt_length: int, room: int | None) -> int:
        limit = self.context_length if room is None else min(self.context_length, room)
        room = limit - prompt_length
        if room < (1 if want is None else int(self.grammar.tables.minimum[list(want)].sum()) + 1):
            who = "the model reads" if limit == self.context_length else "there is room for"
            raise OmniError(f"the prompt has {prompt_length} tokens, {who} at most {limit} with its reply")
        if want is None:
            return room
        longest = [_TEXT_ALLOWANCE, *(max(layout.by_length) for layout in self.grammar.layouts.values())]
        return min(room, sum(longest[modality] for modality in want) + 1)


def _features(
    turns: Sequence[Turn], grammar: Grammar, ids: Int[np.ndarray, " tokens"]
) -> Float[np.ndarray, "features dim"] | None:
    """Features of all that was said, if a prompt has places for them."""
    if not len(grammar.feature_places(ids)):
        return None
    found = [span.features for turn in turns for span in turn.spans if span.features is not None]
    return np.concatenate(found) if found else None


def listed(parts: Sequence) -> Sequence:
    """A prompt that is a list of parts; `UsageError` for a string or anything else."""
    if isinstance(parts, (str, bytes)) or not isinstance(parts, Sequence):
        raise UsageError(f"a prompt is a list of parts, not {type(parts).__name__}: write ['seven']")
    return parts
