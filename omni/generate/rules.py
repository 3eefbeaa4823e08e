"""What may come next: the grammar's tables on the device, and each request's order and budget over them."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from omni.grammar import ROLES, Grammar

SLICED = 2048  # ids of a vocabulary from which on the head is sliced: below, its product is no work


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rules:
    """The grammar's state machine with what the engine asks of it.

    Attributes:
      class_of: class of each id.
      next_state: -1 where the class is not admitted.
      kind: what an id of that class does: begins a part of modality 0 .. `modalities` - 1 (text: or goes on with it),
        ends the reply (`end`), goes on with an open span (`inside`), or is never generated (`never`).
      cost: fewest further tokens until the state after that class may begin a part.
      text: whether a state is inside a text.
      closed: whether the token that led to a state closed a span.
      next_modality: modality whose settings choose the next token.
      shift: what to add to a token's index to get its (time, row, column).
      forbidden: classes that even unconstrained rows may not emit.
      block: which of `inner_blocks`, counted from 1, holds all that may follow a state; 0 for none.
    """

    class_of: Int[Array, " vocabulary"]
    next_state: Int[Array, "states classes"]
    kind: Int[Array, "states classes"]
    cost: Int[Array, "states classes"]
    text: Bool[Array, " states"]
    closed: Bool[Array, " states"]
    next_modality: Int[Array, " states"]
    shift: Int[Array, "states 3"]
    forbidden: Bool[Array, " classes"]
    block: Int[Array, " states"]
    modalities: int = field(metadata={"static": True})
    eos: int = field(metadata={"static": True})
    pad: int = field(metadata={"static": True})

    @property
    def end(self) -> int:
        return self.modalities

    @property
    def inside(self) -> int:
        return self.modalities + 1

    @property
    def never(self) -> int:
        return self.modalities + 2


def make_rules(grammar: Grammar) -> Rules:
    """The rules of a grammar."""
    tables, modalities = grammar.tables, len(grammar.modalities)
    end, inside, never = modalities, modalities + 1, modalities + 2
    control = [tables.bos_class, tables.turn_class, int(tables.class_of[tables.pad])]
    control = [symbol for symbol in control if symbol != tables.eos_class]  # a family may begin and end with one token

    kind_at_top = np.full(tables.next_state.shape[1], never, np.int32)
    kind_at_top[tables.eos_class] = end
    for modality, classes in enumerate(tables.entry):
        kind_at_top[classes] = modality
    kind = np.where(tables.top[:, None], kind_at_top, inside)
    kind[:, control] = never

    forbidden = (tables.next_state < 0).all(axis=0)
    forbidden[control] = True
    states, far = np.arange(len(tables.top)), 1 << 20
    return Rules(
        class_of=jnp.asarray(tables.class_of),
        next_state=jnp.asarray(tables.next_state),
        kind=jnp.asarray(kind),
        cost=jnp.asarray(tables.cost[tables.next_state]),
        text=jnp.asarray(tables.top & (tables.role == ROLES.index("text"))),
        closed=jnp.asarray(tables.closed >= 0),
        next_modality=jnp.asarray(tables.next_modality),
        # A position is the token's index plus what its state fixes, so that one lookup replaces the formula.
        shift=jnp.asarray(grammar.positions(states, np.full_like(states, far)) - far),
        forbidden=jnp.asarray(forbidden),
        block=jnp.asarray(_block_of_state(grammar)),
        modalities=modalities,
        eos=tables.eos,
        pad=tables.pad,
    )


def inner_blocks(grammar: Grammar) -> list[Int[np.ndarray, " ids"]]:
    """For each modality but text, the ids that may come inside of its spans, where they are few enough among many
    (`SLICED`) that logits of them alone are worth a program of their own."""
    tables = grammar.tables
    found = []
    for modality in _sliced(grammar):
        own = (tables.next_modality == modality) & ~tables.top
        classes = (tables.next_state[own] >= 0).any(axis=0)
        found.append(np.flatnonzero(classes[tables.class_of]).astype(np.int32))
    return found


def _sliced(grammar: Grammar) -> list[int]:
    """Modalities with a block of their own."""
    size = len(grammar.tables.class_of)
    codes = [sum(len(table) for table in layout.tables) for layout in grammar.layouts.values()]
    return [place for place, count in enumerate(codes, start=1) if size >= SLICED and 2 * count <= size]


def _block_of_state(grammar: Grammar) -> Int[np.ndarray, " states"]:
    tables, sliced = grammar.tables, _sliced(grammar)
    place = np.zeros(len(grammar.modalities), np.int32)
    place[sliced] = np.arange(1, len(sliced) + 1)
    return np.where(tables.top, 0, place[tables.next_modality]).astype(np.int32)


def admitted_classes(
    rules: Rules,
    state: Int[Array, " requests"],
    remaining: Int[Array, " requests"],
    expected: Int[Array, " requests"],
    reserve: Int[Array, "requests 2"],
    free: Bool[Array, " requests"],
    constrained: Bool[Array, " requests"],
) -> Bool[Array, "requests classes"]:
    """Which classes may come next for each request.

    Args:
      state: grammar state.
      remaining: tokens left of the budget.
      expected: the next wanted modality, or `rules.end` if none is left.
      reserve: tokens that must be left after one that goes on with a part, and after one that begins what is expected.
      free: no order is asked for.
    """
    next_state, kind = rules.next_state[state], rules.kind[state]
    begins_expected = kind == expected[:, None]
    in_order = begins_expected | (kind == rules.inside) | ((kind == 0) & rules.text[state][:, None])
    in_order |= free[:, None] & (kind <= rules.end)
    needed = 1 + rules.cost[state] + jnp.where(begins_expected, reserve[:, 1:], reserve[:, :1])
    admitted = (next_state >= 0) & in_order & (needed <= remaining[:, None])
    return jnp.where(constrained[:, None], admitted, ~rules.forbidden)
