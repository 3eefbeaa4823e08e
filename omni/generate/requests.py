"""What is asked of the engine and what it gives back: numpy only, every modality by its index in the grammar."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from omni.grammar import Grammar
from omni_tokenizers.errors import OmniError, UsageError

# Far beyond what makes sense, and far from where float32 sums of logits overflow.
HOTTEST, STRONGEST = 1_000_000, 1_000_000
PENALTIES = (0.001, 1000)
MOST_K = 2**30  # within int32


@dataclass(frozen=True, eq=False)
class Shadow:
    """A second prompt that reads every token its request emits, and what its logits weigh in the request's choice.

    Attributes:
      ids: the prompt, such as `bos, turn`.
      weight: share of these logits for each modality; the request's own weigh 1 - the sum over its shadows.
      features: as of `PreparedRequest`.
      is_chat: whether the prompt, such as one of padding, is no document though the request's is.
    """

    ids: Int[np.ndarray, " tokens"]
    weight: Float[np.ndarray, " modalities"]
    features: Float[np.ndarray, "features dim"] | None = None
    is_chat: bool = False


@dataclass(frozen=True, eq=False)
class PreparedRequest:
    """A prompt as ids, and how to answer it.

    Attributes:
      ids: the prompt, `bos, parts, turn`, or a chat as a model's template writes it.
      max_tokens: most tokens of the reply, eos included.
      temperature: by modality; 0 takes the likeliest token.
      top_k: by modality; only the k likeliest tokens, 0 for all.
      top_p: by modality; only the likeliest tokens that together have this probability, 1 for all.
      min_p: by modality; only tokens at least so many times as likely as the likeliest, 0 for all.
      repetition_penalty: by modality; divides positive and multiplies negative logits (under guidance, of what it has
        made of them) of ids that stand in the prompt or the reply, 1 for none.
      want: modality indices of the reply's parts, in order; None leaves them to the model.
      seed: the key of token i of the reply is fold_in(key(seed), i), whatever else is in the batch.
      constrained: whether only ids that the grammar admits may come.
      shadows: classifier-free guidance; see `unconditional_shadow`.
      log_probabilities: whether the reply comes with them.
      stop_tokens: ids that end the reply where they come, unless a span is open: that is finished first.
      stop: where a reply that has these ids ends, as the number of those that it keeps, or None where it goes on. What
        it keeps must parse, and whether more ids follow may change nothing.
      features: what stands in the stream at those places of the prompt that the grammar keeps for features
        (`Grammar.feature_places`), in their order; None where there are no such places.
      is_chat: whether the prompt, and those of its shadows, are a template's (`Grammar.annotate_chat`).
    """

    ids: Int[np.ndarray, " tokens"]
    max_tokens: int
    temperature: Float[np.ndarray, " modalities"]
    top_k: Int[np.ndarray, " modalities"]
    top_p: Float[np.ndarray, " modalities"]
    min_p: Float[np.ndarray, " modalities"]
    repetition_penalty: Float[np.ndarray, " modalities"]
    want: tuple[int, ...] | None = None
    seed: int = 0
    constrained: bool = True
    shadows: tuple[Shadow, ...] = ()
    log_probabilities: bool = False
    stop_tokens: tuple[int, ...] = ()
    stop: Callable[[Int[np.ndarray, " tokens"]], int | None] | None = None
    features: Float[np.ndarray, "features dim"] | None = None
    is_chat: bool = False

    @property
    def longest_prompt(self) -> int:
        """Tokens of its prompt or that of a shadow."""
        return max(len(prompt.ids) for prompt in (self, *self.shadows))

    @property
    def penalises(self) -> bool:
        """Whether there is a repetition penalty in any modality."""
        return bool(np.any(self.repetition_penalty != 1))


@dataclass(frozen=True, eq=False)
class Generated:
    """A reply.

    Attributes:
      ids: its tokens, eos included if it came to it.
      well_formed: whether the grammar admits every token and no span is left open.
      log_probabilities: of each token under the distribution that it was drawn from (see `sampling.sample`), or None.
    """

    ids: Int[np.ndarray, " tokens"]
    well_formed: bool
    log_probabilities: Float[np.ndarray, " tokens"] | None = None


def is_whole(value: object) -> bool:
    """Whether this is a whole number."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def per_modality(
    grammar: Grammar,
    setting: float | Mapping[str, float],
    default: float | Float[np.ndarray, " modalities"],
    name: str,
) -> Float[np.ndarray, " modalities"]:
    """A setting as an array by modality.

    Args:
      setting: one value for all, or modality -> value.
      default: for the rest, one value or one by modality.
      name: of the setting, for messages.

    Raises:
      UsageError: for a modality that the grammar does not have, and for a value that is no finite number.
    """
    if isinstance(setting, Mapping):
        for modality in setting:
            _index(grammar, modality, name)
        defaults = np.broadcast_to(default, len(grammar.modalities))
        setting = [setting.get(modality, each) for modality, each in zip(grammar.modalities, defaults, strict=True)]
    try:
        with np.errstate(over="ignore"):  # beyond float32 it becomes infinite, and is refused as such
            values = np.broadcast_to(np.asarray(setting, np.float32), len(grammar.modalities)).copy()
    except (TypeError, ValueError, OverflowError):
        values = np.array([np.nan])
    if not np.isfinite(values).all():
        raise UsageError(f"{name} must be a finite number, or modality -> number, not {setting}")
    return values


def wanted_modalities(grammar: Grammar, want: Sequence[str] | None) -> tuple[int, ...] | None:
    """Names of modalities as indices; `UsageError` names the nearest known one."""
    return None if want is None else tuple(_index(grammar, modality, "want") for modality in want)


def _index(grammar: Grammar, modality: str, name: str) -> int:
    if modality not in grammar.modalities:
        near = difflib.get_close_matches(modality, grammar.modalities, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        known = ", ".join(grammar.modalities)
        raise UsageError(f"{name}: unknown modality '{modality}'; this model knows {known}{hint}")
    return grammar.modalities.index(modality)


def unconditional_shadow(
    ids: Int[np.ndarray, " tokens"], guidance: Float[np.ndarray, " modalities"]
) -> tuple[Shadow, ...]:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598): unconditional + guidance x (own - that).

    Nothing where the guidance is 1 for every modality.
    """
    guidance = np.asarray(guidance, np.float32)
    return () if (guidance == 1).all() else (Shadow(ids, 1 - guidance),)


def guidance_shadows(
    ids: Int[np.ndarray, " tokens"],
    media: Int[np.ndarray, " media_tokens"],
    nothing: Int[np.ndarray, " control_tokens"],
    guidance: Float[np.ndarray, " modalities"],
    media_guidance: Float[np.ndarray, " modalities"],
) -> tuple[Shadow, ...]:
    """Guidance in two steps, as Chameleon's (arXiv:2405.09818): nothing + media_guidance x (media - nothing) +
    guidance x (own - media).

    Where both guidances are the same, or the prompt lacks one of the two, it is that of `unconditional_shadow`.

    Args:
      ids: the whole prompt.
      media: the prompt without its texts.
      nothing: the empty prompt.
    """
    if np.array_equal(media, nothing):
        return unconditional_shadow(nothing, guidance)
    shadows = unconditional_shadow(nothing, media_guidance)
    if np.array_equal(media, ids) or np.array_equal(guidance, media_guidance):
        return shadows
    return (*shadows, Shadow(media, np.asarray(media_guidance - guidance, np.float32)))


def useful_shadows(request: PreparedRequest) -> list[Shadow]:
    """The shadows that weigh something in a modality that the reply may hold."""
    reachable = slice(None) if request.want is None else sorted({0, *request.want})
    return [shadow for shadow in request.shadows if np.any(shadow.weight[reachable])]


def check_request(
    request: PreparedRequest, grammar: Grammar, width: int, context: int | None, capacity: int | None = None
) -> None:
    """Refuses what cannot be answered.

    Args:
      width: of the stream, and so of features.
      context: most tokens of prompt and reply that the model reads.
      capacity: most tokens of them that the batch has room for.

    Raises:
      UsageError: for settings out of range, and for wanted parts that cannot be or do not fit.
      OmniError: if prompt and reply together are too long.
    """
    for name, value in (("max_tokens", request.max_tokens), ("seed", request.seed)):
        if not is_whole(value):
            raise UsageError(f"{name} is {value!r}; it must be a whole number")
    if request.max_tokens < 1:
        raise UsageError(f"max_tokens is {request.max_tokens}; it must be at least 1")
    ranges = (
        ("temperature", request.temperature, 0, HOTTEST, f"0 to {HOTTEST}"),
        ("top_k", request.top_k, 0, MOST_K, f"0 (all) to {MOST_K}"),
        ("top_p", request.top_p, np.finfo(np.float32).tiny, 1, "above 0 and at most 1"),
        ("min_p", request.min_p, 0, 1, "0 (all) to 1"),
        ("repetition_penalty", request.repetition_penalty, *PENALTIES, f"{PENALTIES[0]} to {PENALTIES[1]} (1: none)"),
    )
    for name, values, low, high, allowed in ranges:
        for modality, value in zip(grammar.modalities, values, strict=True):
            if not low <= value <= high:
                raise UsageError(f"{name} of {modality} is {value}; it must be {allowed}")
    for prompt in (request, *request.shadows):
        needed = (len(grammar.feature_places(prompt.ids)), width)
        there = (0, width) if prompt.features is None else np.shape(prompt.features)
        if there != needed:
            raise UsageError(f"a prompt has places for features {list(needed)}, not {list(there)}")
    for shadow in request.shadows:
        if not (np.abs(shadow.weight) <= STRONGEST).all():  # written so that NaN fails, too
            raise UsageError(f"guidance must be a finite number of at most {STRONGEST} in size")
    for token in request.stop_tokens:
        if not 0 <= token < grammar.vocabulary.size:
            raise UsageError(f"stop_tokens are ids in 0..{grammar.vocabulary.size - 1}, not {token}")
    if request.want is not None:
        _check_want(request, grammar)
    longest, needed = request.longest_prompt, request.longest_prompt + request.max_tokens
    for limit, who in ((context, "the model reads"), (capacity, "this batch has room for")):
        if limit is not None and needed > limit:
            raise OmniError(
                f"the prompt has {longest} tokens and the reply may have {request.max_tokens}, but {who} at most "
                f"{limit}; shorten the prompt or lower max_tokens"
            )


def _check_want(request: PreparedRequest, grammar: Grammar) -> None:
    want = request.want
    if not want:
        raise UsageError("want is empty; name at least one modality, or leave it out")
    if not request.constrained:
        raise UsageError("want needs the grammar's constraint; leave want out, or leave constrained on")
    if not all(0 <= modality < len(grammar.modalities) for modality in want):
        raise UsageError(f"want: modality indices run from 0 to {len(grammar.modalities) - 1}, not {want}")
    if any(left == right == 0 for left, right in itertools.pairwise(want)):
        raise UsageError("want names text twice in a row; two adjacent texts are one")
    fewest = int(grammar.tables.minimum[list(want)].sum()) + 1
    if fewest > request.max_tokens:
        names = ", ".join(grammar.modalities[modality] for modality in want)
        raise UsageError(f"want: {names} take at least {fewest} tokens, but max_tokens is {request.max_tokens}")
