"""The compiled part of generation: `read_prompts` reads what is given, `enter` begins replies, `advance` emits tokens.

The batch has two axes. *Requests* are slots, in which one request after the other emits its tokens. *Rows* are what the
transformer sees: row i of the first ones belongs to slot i, the others are shadows, which read every token that their
slot emits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt

from omni.generate.rules import Rules, admitted_classes
from omni.generate.sampling import penalise, sample
from omni.model import CACHE_AXES, Decoder, decoder_stream
from omni.model.attention import Cache
from omni.model.code_nets import CodeHead
from omni.model.quantized import Held, dequantized
from omni.model.transformer import project
from omni.sharding import constrain

PARTS, REPLIES, NOTHING = 1, 2, 3
"""At what ends `advance` pauses: `State.ended` that is at least this."""
PLAUSIBLE = 0.1  # least share of the likeliest id's own probability that an id needs to be drawn under guidance above 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Block:
    """Ids that the next token may be, ascending, and their rows of the head."""

    ids: Int[Array, " ids"]
    head: Held
    codes: CodeHead | None = None
    """The head of the last of them, where those are codes with a head of their own."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Settings:
    """What stays the same while no request comes or goes.

    Attributes:
      leader: the slot that each row follows; -1 for none.
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
      stream: what each row's last token left, whose products with the head are logits.
      length: tokens that each row has read: the next one's index and cache slot.
      tokens: emitted ids, of which `count` are true.
      grammar: grammar state.
      begun: how many of the wanted parts have begun.
      done: whether the slot is free: its reply has ended, or none has begun.
      broken: whether a token came that the grammar does not admit.
      ended: what the last token ended for some request: a reply (`REPLIES`), a part alone (`PARTS`) or nothing (0).
      steps: tokens that the batch has emitted, several requests' at once counted once.
      seen: ids that stand in the prompt or the reply; without columns where no request has a repetition penalty, and
        then the program has no trace of it.
      log_probabilities: of the emitted ids; without columns where no request asks for them.
    """

    cache: list[Cache]
    stream: Float[Array, "rows dim"]
    length: Int[Array, " rows"]
    tokens: Int[Array, "requests capacity"]
    count: Int[Array, " requests"]
    grammar: Int[Array, " requests"]
    begun: Int[Array, " requests"]
    done: Bool[Array, " requests"]
    broken: Bool[Array, " requests"]
    ended: Int[Array, ""]
    steps: Int[Array, ""]
    seen: Bool[Array, "requests vocabulary_or_none"]
    log_probabilities: Float[Array, "requests capacity_or_none"]


def read_prompts(
    decoder: Decoder,
    state: State,
    rows: Int[Array, " some"],
    ids: Int[Array, "some length"],
    positions: Int[Array, "some length 3"],
    start: Int[Array, " some"],
    last: Int[Array, " some"],
    features: Float[Array, "some length dim"] | None = None,
) -> State:
    """Some rows read the next tokens of their prompts, right-padded: the first goes to slot `start` of the cache, and
    the stream becomes that of token `last` of them. A row that does not exist reads for nothing. Where ids are
    negative, `features` stand."""
    stream, cache = decoder_stream(decoder, ids, positions, start, state.cache, last, rows, features)
    return everywhere(replace(state, cache=cache, stream=_put(state.stream, rows, stream[:, 0])))


def copy_rows(state: State, sources: Int[Array, " some"], targets: Int[Array, " some"]) -> State:
    """A prompt that was read once serves other rows; a target that does not exist gets nothing."""

    def copied(stored: Array) -> Array:
        return constrain(stored.at[targets].set(stored[sources], mode="drop"), *CACHE_AXES)

    stream = _put(state.stream, targets, state.stream[sources])
    return everywhere(replace(state, cache=jax.tree.map(copied, state.cache), stream=stream))


def _put(
    stream: Float[Array, "rows dim"], rows: Int[Array, " some"], new: Float[Array, "some dim"]
) -> Float[Array, "rows dim"]:
    return constrain(stream.at[rows].set(new, mode="drop"), "batch", None)


def enter(
    state: State,
    begins: Bool[Array, " requests"],
    grammar: Int[Array, " requests"],
    length: Int[Array, " rows"],
    seen: Bool[Array, "requests vocabulary_or_none"],
) -> State:
    """Begins replies in some slots, all prompts of which are read.

    Args:
      begins: the slots.
      grammar: the state after a slot's prompt.
      length: tokens of a row's prompt; -1 for rows of other slots.
      seen: ids that stand in a slot's prompt.
    """

    def fresh(new, old: Array) -> Array:
        return jnp.where(begins.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    fresh_state = replace(
        state,
        length=jnp.where(length < 0, state.length, length),
        count=fresh(0, state.count),
        grammar=fresh(grammar, state.grammar),
        begun=fresh(0, state.begun),
        done=fresh(False, state.done),
        broken=fresh(False, state.broken),
        seen=fresh(seen, state.seen),
    )
    return everywhere(fresh_state)


def end(state: State, ends: Bool[Array, " requests"]) -> State:
    """Ends the replies of some slots as they are."""
    return everywhere(replace(state, done=state.done | ends))


def everywhere(state: State) -> State:
    """The state with all that the host looks at whole on every device, since a process sees its own devices alone."""
    looked_at = {name: value for name, value in vars(state).items() if name not in ("cache", "stream")}
    return replace(state, **{name: constrain(value, *[None] * value.ndim) for name, value in looked_at.items()})


def advance(
    decoder: Decoder,
    rules: Rules,
    blocks: Sequence[Block],
    settings: Settings,
    state: State,
    n: Int[Array, ""],
    pause: Int[Array, ""],
) -> State:
    """Emits up to `n` tokens for every request not yet done; stops after one that ended what `pause` says (`PARTS`,
    replies among them; `REPLIES`; `NOTHING`)."""

    def more(carry: tuple[Int[Array, ""], State]) -> Bool[Array, ""]:
        taken, state = carry
        return (taken < n) & ~jnp.all(state.done) & (state.ended < pause)

    def body(carry: tuple[Int[Array, ""], State]) -> tuple[Int[Array, ""], State]:
        taken, state = carry
        state, token = emit(decoder, rules, blocks, settings, state)
        # What ends the last reply is not read: a loop of one turn or none, since XLA copies a cache that goes through a
        # conditional.
        turns = jnp.any(~state.done).astype(jnp.int32)
        reading = partial(read, decoder, rules, settings, token=token)
        return taken + 1, jax.lax.fori_loop(0, turns, lambda _, state: reading(state), state)

    start = replace(state, ended=jnp.zeros((), jnp.int32))
    return everywhere(jax.lax.while_loop(more, body, (jnp.zeros((), jnp.int32), start))[1])


def emit(
    decoder: Decoder, rules: Rules, blocks: Sequence[Block], settings: Settings, state: State
) -> tuple[State, Int[Array, " requests"]]:
    """Chooses the next token of every request and notes it; a request that is done emits padding, unnoted."""
    requests = jnp.arange(len(state.count))
    remaining = settings.limit - state.count
    expected = settings.want[requests, state.begun]
    reserve = settings.reserve[requests[:, None], state.begun[:, None] + jnp.arange(2)]
    admitted = admitted_classes(rules, state.grammar, remaining, expected, reserve, settings.free, settings.constrained)
    live = ~state.done & jnp.any(admitted, axis=-1)
    everything = Block(jnp.arange(len(rules.class_of)), decoder.head, decoder.codes)
    ways = [partial(choose, rules, block, settings) for block in (everything, *blocks)]
    inside = jnp.where(settings.constrained, rules.block[state.grammar], 0)
    # The head's product, most of a small model's work, is taken with the ids of one block where all are inside it.
    block = jnp.max(jnp.where(live, inside, 0))
    block = jnp.where(jnp.all(~live | (inside == block)), block, 0)
    token, log_probability = jax.lax.switch(block, ways, state, admitted, live)
    token = jnp.where(live, token, rules.pad)

    symbol = rules.class_of[token]
    kind, next_state = rules.kind[state.grammar, symbol], rules.next_state[state.grammar, symbol]
    grammar = jnp.where(live & (next_state >= 0), next_state, state.grammar)
    begins = live & ~settings.free & (kind == expected) & (kind < rules.end)
    whole = (next_state < 0) | (rules.cost[state.grammar, symbol] == 0)
    stopped = whole & jnp.any(settings.stop_tokens == token[:, None], axis=-1)
    done = ~live | (token == rules.eos) | (remaining <= 1) | stopped
    part_ended = rules.closed[grammar] | (rules.text[state.grammar] & (kind != 0)) | done
    ended = jnp.where(state.done, 0, part_ended.astype(jnp.int32) + done)
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
        ended=jnp.max(ended),
        steps=state.steps + 1,
        seen=state.seen.at[requests, token].set(True) if state.seen.shape[1] else state.seen,
        log_probabilities=log_probabilities,
    )
    return state, token


def choose(
    rules: Rules,
    block: Block,
    settings: Settings,
    state: State,
    admitted: Bool[Array, "requests classes"],
    live: Bool[Array, " requests"],
) -> tuple[Int[Array, " requests"], Float[Array, " requests"]]:
    """An id of the block for every request, and the log-probability that it had."""
    requests, modality = jnp.arange(len(live)), rules.next_modality[state.grammar]
    logits = project(state.stream[:, None], dequantized(block.head), block.codes)[:, 0]
    logits, plausible = guided_logits(settings, logits, modality, admitted[:, rules.class_of[block.ids]])
    if state.seen.shape[1]:
        logits = penalise(logits, state.seen[:, block.ids], settings.repetition_penalty[requests, modality])
    place, log_probability = sample(
        logits,
        plausible,
        jax.vmap(token_key)(settings.seed, state.count),
        settings.temperature[requests, modality],
        jnp.where(live, settings.top_k[requests, modality], 0),  # what needs no top-k or top-p does not pay for it
        jnp.where(live, settings.top_p[requests, modality], 1),
        settings.min_p[requests, modality],
    )
    return block.ids[place], log_probability


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
    """Every row reads the token of its slot. Rows of nobody, and of a slot that is done, keep their cache and stream:
    there may be what a later request begins with, or the prompt of one that is about to begin."""
    leader, capacity = jnp.maximum(settings.leader, 0), state.cache[0][0].shape[2]
    idle = (settings.leader < 0) | state.done[leader]
    positions = state.length[:, None] + rules.shift[state.grammar[leader]]
    slots = jnp.where(idle, capacity, state.length)
    stream, cache = decoder_stream(decoder, token[leader][:, None], positions[:, None], slots, state.cache)
    stream = jnp.where(idle[:, None], state.stream, stream[:, 0])
    return replace(state, cache=cache, stream=stream, length=state.length + ~idle)
