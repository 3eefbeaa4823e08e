"""The compiled part of generation: `prefill` reads the prompts, `advance` emits tokens.

The batch has two axes. *Requests* emit tokens. *Rows* are what the transformer sees: row i of the first ones belongs to
request i, the others are shadows, which read every token that their request emits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt

from omni.generate.rules import Rules, admitted_classes
from omni.generate.sampling import penalise, sample
from omni.model import CACHE_AXES, Decoder, apply_decoder, init_cache
from omni.sharding import constrain

Cache = list[tuple[Array, Array]]
PLAUSIBLE = 0.1  # least share of the likeliest id's own probability that an id needs to be drawn under guidance above 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Settings:
    """What stays the same while a batch is generated.

    Attributes:
      leader: the request that each row follows.
      shadow: rows of a request's shadows (its own row where it has fewer).
      weight: what each shadow weighs, by modality (0 where there is none).
      want: wanted modalities, then `rules.end`.
      reserve: fewest tokens, eos included, of the parts that are still wanted after so many; 0 for free requests.
      stop_tokens: ids that end a reply outside of open spans, then -1; without columns where no request has any.
    """

    leader: Int[Array, " rows"]
    shadow: Int[Array, "requests shadows"]
    weight: Float[Array, "requests shadows modalities"]
    want: Int[Array, "requests wants"]
    reserve: Int[Array, "requests wants_and_end"]
    free: Bool[Array, " requests"]
    constrained: Bool[Array, " requests"]
    limit: Int[Array, " requests"]
    seed: UInt[Array, " requests"]
    temperature: Float[Array, "requests modalities"]
    top_k: Int[Array, "requests modalities"]
    top_p: Float[Array, "requests modalities"]
    min_p: Float[Array, "requests modalities"]
    repetition_penalty: Float[Array, "requests modalities"]
    stop_tokens: Int[Array, "requests stops"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What a token changes.

    Attributes:
      cache: keys and values of each layer.
      logits: what each row's last token predicts.
      length: tokens that each row has read: the next one's index and cache slot.
      tokens: emitted ids, of which `count` are true.
      grammar: grammar state.
      begun: how many of the wanted parts have begun.
      broken: whether a token came that the grammar does not admit.
      part_ended: whether some request ended a part with its last token.
      steps: tokens emitted by the longest request.
      seen: ids that stand in the prompt or the reply; without columns where no request has a repetition penalty, and
        then the program has no trace of it.
      log_probabilities: of the emitted ids; without columns where no request asks for them.
    """

    cache: Cache
    logits: Float[Array, "rows vocabulary"]
    length: Int[Array, " rows"]
    tokens: Int[Array, "requests capacity"]
    count: Int[Array, " requests"]
    grammar: Int[Array, " requests"]
    begun: Int[Array, " requests"]
    done: Bool[Array, " requests"]
    broken: Bool[Array, " requests"]
    part_ended: Bool[Array, ""]
    steps: Int[Array, ""]
    seen: Bool[Array, "requests vocabulary_or_none"]
    log_probabilities: Float[Array, "requests capacity_or_none"]


def prefill(
    decoder: Decoder,
    ids: Int[Array, "rows length"],
    positions: Int[Array, "rows length 3"],
    length: Int[Array, " rows"],
    capacity: int,
) -> tuple[Cache, Float[Array, "rows vocabulary"]]:
    """Reads right-padded prompts: a cache of `capacity` slots with them, and the logits after each one's last token."""
    cache = init_cache(decoder.config, len(ids), capacity)
    logits, cache = apply_decoder(decoder, ids, positions, jnp.zeros_like(length), cache, last=length - 1)
    return cache, logits[:, 0]


def copy_rows(
    cache: Cache, logits: Float[Array, "read vocabulary"], source: Int[Array, " rows"]
) -> tuple[Cache, Float[Array, "rows vocabulary"]]:
    """What `prefill` gave, row i now being row `source[i]`: a prompt that was read once serves several rows."""
    cache = jax.tree.map(lambda stored: constrain(stored[source], *CACHE_AXES), cache)
    return cache, constrain(logits[source], "batch", "vocabulary")


def advance(
    decoder: Decoder, rules: Rules, settings: Settings, state: State, n: Int[Array, ""], pause: Bool[Array, ""]
) -> State:
    """Emits up to `n` tokens for every request not yet done; with `pause`, stops after a token that ended a part."""

    def more(carry: tuple[Int[Array, ""], State]) -> Bool[Array, ""]:
        taken, state = carry
        return (taken < n) & ~jnp.all(state.done) & ~(pause & state.part_ended)

    def body(carry: tuple[Int[Array, ""], State]) -> tuple[Int[Array, ""], State]:
        taken, state = carry
        state, token = emit(rules, settings, state)
        return taken + 1, read(decoder, rules, settings, state, token)

    start = replace(state, part_ended=jnp.zeros((), bool))
    return jax.lax.while_loop(more, body, (jnp.zeros((), jnp.int32), start))[1]


def emit(rules: Rules, settings: Settings, state: State) -> tuple[State, Int[Array, " requests"]]:
    """Chooses the next token of every request and notes it; a request that is done emits padding, unnoted."""
    requests = jnp.arange(len(state.count))
    remaining = settings.limit - state.count
    expected = settings.want[requests, state.begun]
    reserve = settings.reserve[requests[:, None], state.begun[:, None] + jnp.arange(2)]
    admitted = admitted_classes(rules, state.grammar, remaining, expected, reserve, settings.free, settings.constrained)
    modality = rules.next_modality[state.grammar]
    live = ~state.done & jnp.any(admitted, axis=-1)
    logits, plausible = guided_logits(settings, state.logits, modality, admitted[:, rules.class_of])
    if state.seen.shape[1]:
        logits = penalise(logits, state.seen, settings.repetition_penalty[requests, modality])
    token, log_probability = sample(
        logits,
        plausible,
        jax.vmap(token_key)(settings.seed, state.count),
        settings.temperature[requests, modality],
        jnp.where(live, settings.top_k[requests, modality], 0),  # what needs no top-k or top-p does not pay for it
        jnp.where(live, settings.top_p[requests, modality], 1),
        settings.min_p[requests, modality],
    )
    token = jnp.where(live, token, rules.pad)

    symbol = rules.class_of[token]
    kind, next_state = rules.kind[state.grammar, symbol], rules.next_state[state.grammar, symbol]
    grammar = jnp.where(live & (next_state >= 0), next_state, state.grammar)
    begins = live & ~settings.free & (kind == expected) & (kind < rules.end)
    whole = (next_state < 0) | (rules.cost[state.grammar, symbol] == 0)
    stopped = whole & jnp.any(settings.stop_tokens == token[:, None], axis=-1)
    done = ~live | (token == rules.eos) | (remaining <= 1) | stopped
    part_ended = rules.closed[grammar] | (rules.text[state.grammar] & (kind != 0)) | done
    place = jnp.where(live, state.count, state.tokens.shape[1])
    log_probabilities = state.log_probabilities
    if log_probabilities.shape[1]:
        log_probabilities = log_probabilities.at[requests, place].set(log_probability, mode="drop")
    state = replace(
        state,
        tokens=state.tokens.at[requests, place].set(token, mode="drop"),
        count=state.count + live,
        grammar=grammar,
        begun=state.begun + begins,
        done=done,
        broken=state.broken | (live & (next_state < 0)),
        part_ended=jnp.any(part_ended & ~state.done),
        steps=state.steps + 1,
        seen=state.seen.at[requests, token].set(True) if state.seen.shape[1] else state.seen,
        log_probabilities=log_probabilities,
    )
    return state, token


def token_key(seed: UInt[Array, ""], count: Int[Array, ""]) -> PRNGKeyArray:
    """The key of a request's token `count`: neither its slot nor its batch changes it."""
    return jax.random.fold_in(jax.random.key(seed), count)


def guided_logits(
    settings: Settings,
    logits: Float[Array, "rows vocabulary"],
    modality: Int[Array, " requests"],
    admitted: Bool[Array, "requests vocabulary"],
) -> tuple[Float[Array, "requests vocabulary"], Bool[Array, "requests vocabulary"]]:
    """Own logits + sum over shadows of weight (shadow's - own), and the admitted ids that are left to choose from.

    Guidance is defined on log-probabilities; their normalisers only add a constant to a row, which no draw sees. Above
    1 it lifts whatever the shadows find still less likely than the request does, nonsense too: so there a request
    chooses among ids that by itself it finds at least `PLAUSIBLE` times as likely as the likeliest (the plausibility
    constraint of contrastive decoding, Li et al. 2023, arXiv:2210.15097, section 3.3).
    """
    own = logits[: len(modality)]
    guided, lifted = own, jnp.zeros(len(modality), bool)
    for place in range(settings.shadow.shape[1]):
        weight = settings.weight[jnp.arange(len(modality)), place, modality]
        guided = guided + weight[:, None] * (logits[settings.shadow[:, place]] - own)
        lifted |= weight < 0
    if settings.shadow.shape[1]:
        likeliest = jnp.max(jnp.where(admitted, own, -jnp.inf), axis=-1)
        admitted = admitted & ((own >= likeliest[:, None] + math.log(PLAUSIBLE)) | ~lifted[:, None])
    return guided, admitted


def read(decoder: Decoder, rules: Rules, settings: Settings, state: State, token: Int[Array, " requests"]) -> State:
    """Every row reads the token of its request (padding, which nothing looks at again, once the request is done)."""
    leader = settings.leader
    positions = state.length[:, None] + rules.shift[state.grammar[leader]]
    logits, cache = apply_decoder(decoder, token[leader][:, None], positions[:, None], state.length, state.cache)
    return replace(state, cache=cache, logits=logits[:, 0], length=state.length + 1)
