"""Reads a compiled, scheduled program (XLA's HLO text): how often what runs, what travels, what memory is touched."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(?.*?\)?) ([a-z][a-z0-9-]*)\((.*)$")
_SHAPE = re.compile(r"([a-z]+[0-9]*(?:e[0-9]m[0-9][a-z]*)?)\[([0-9,]*)\](\{[^}]*\})?")
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ON_CHIP = "S(1)"
COLLECTIVES = {
    # kind -> bytes that a device of a group of n sends for each byte of the larger of operand and result
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}
_BETWEEN_SLICES = "_xla_megascale_transfer_type"
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota"}
_FREE |= {"after-all", "partition-id", "replica-id", "opt-barrier"}


_COMPUTES = ("fusion", "convolution", "dot", "custom-call", "while")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""Instructions that write into their first operand where it lies, and which operand holds what they write."""


@dataclass
class Instruction:
    """A line of the program."""

    name: str
    shape: str
    opcode: str
    operands: list[str]
    text: str
    """All behind the opcode."""

    def is_parameter(self, number: int) -> bool:
        """Whether it is the parameter of that number."""
        return self.opcode == "parameter" and self.text.lstrip().startswith(f"{number})")

    def called(self, what: str) -> str | None:
        """The computation that it calls as `what` (body, condition, calls ...)."""
        found = re.search(rf"\b{what}=%?([\w.-]+)", self.text)
        return found and found.group(1)


@dataclass
class Computation:
    """A list of instructions in the order in which they are issued."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)

    def __getitem__(self, name: str) -> Instruction:
        return self._by_name()[name]

    def _by_name(self) -> dict[str, Instruction]:
        if not hasattr(self, "_names"):
            self._names = {each.name: each for each in self.instructions}
        return self._names


@dataclass(frozen=True)
class Collective:
    """What a device sends to others, in one run of the program."""

    kind: str
    bytes: float
    """That it sends, all times together."""
    times: int
    groups: list[list[int]]
    """Devices (numbers within the mesh) that exchange with one another."""
    hidden: bool
    """Whether computation is scheduled between its start and its end."""


class Program:
    """A scheduled HLO module.

    Args:
      text: as `compiled.as_text()` gives it.
      devices: how many devices run it.
    """

    def __init__(self, text: str, devices: int):
        self.devices = devices
        self.computations, self.entry = _parse(text)

    def loop(self) -> Program:
        """What one turn of the entry's longest loop does."""
        bodies = [each.called("body") for each in self.computations[self.entry].instructions if each.opcode == "while"]
        turn = copy.copy(self)
        turn.entry = max(bodies, key=lambda name: len(self.computations[name].instructions))
        return turn

    def collectives(self) -> list[Collective]:
        """All that travels between devices."""
        return [each for computation, times in self.scheduled() for each in self._collectives(computation, times)]

    def _collectives(self, computation: Computation, times: int) -> Iterator[Collective]:
        fused: dict[str, list[int]] = {}  # those that are taken in several steps, each beside the work of a fusion
        for place, instruction in enumerate(computation.instructions):
            if instruction.opcode == "fusion":
                for each in self._fused_collectives(instruction):
                    fused.setdefault(_channel(each), []).append(place)
            elif instruction.opcode == "send" and _BETWEEN_SLICES in instruction.text:
                yield self._between_slices(computation, place, times)
            elif (inner := self._collective(instruction)) is not None:
                hidden = instruction.opcode.endswith("-start") and self._computes_until_done(computation, place)
                yield self._sent(*inner, instruction, times, hidden)
        for channel, places in fused.items():
            first = computation.instructions[places[0]]
            each = next(each for each in self._fused_collectives(first) if _channel(each) == channel)
            between = computation.instructions[places[0] + 1 : places[-1]]
            yield self._sent(*self._collective(each), each, times, any(other.opcode in _COMPUTES for other in between))

    def _sent(self, kind: str, size: float, instruction: Instruction, times: int, hidden: bool) -> Collective:
        groups = _groups(instruction.text, self.devices) or _groups(self._inner_text(instruction), self.devices)
        groups = groups or [list(range(self.devices))]
        members = len(groups[0])
        sent = 0.0 if members == 1 else COLLECTIVES[kind](members) * size * times
        return Collective(kind, sent, times, groups, hidden)

    def _between_slices(self, computation: Computation, place: int, times: int) -> Collective:
        """A collective between slices of TPUs: hosts exchange what each device hands to its own, with what its
        counterparts in the other slices hand to theirs, and hand back what comes of it."""
        send = computation.instructions[place]
        meeting = re.search(r'_xla_host_transfer_rendezvous="[^"]*"', send.text).group()
        receive = next(each for each in computation.instructions if each.opcode == "recv" and meeting in each.text)
        named = re.search(rf'{_BETWEEN_SLICES}="(\w+)"', send.text).group(1).lower().replace("_", "-")
        kind = "collective-permute" if named == "one-to-one" else named
        # Who exchanges is written as "{1,2}x{0:3}" (slices x devices), {{100000,200000},...} or {{100000->200000},...}.
        members = len(re.split(",|->", re.search(r'_xla_megascale_target="?\{+([\d,>-]+)\}', send.text).group(1)))
        apart = self.devices // members  # slices are the first axis of a mesh
        size = max(_bytes(_SHAPE.search(each.shape)) for each in (send, receive))
        later = computation.instructions[place + 1 :]
        until = next(i for i, each in enumerate(later) if each.opcode == "recv-done" and receive.name in each.operands)
        return Collective(
            kind,
            COLLECTIVES[kind](members) * size * times,
            times,
            [list(range(first, self.devices, apart)) for first in range(apart)],
            any(each.opcode in _COMPUTES for each in later[:until]),
        )

    def _fused_collectives(self, fusion: Instruction) -> list[Instruction]:
        """The collectives inside of a fusion, of which an asynchronous one stands in every fusion that takes a step."""
        found = []
        for each in self.computations[fusion.called("calls")].instructions:
            if each.opcode in COLLECTIVES:
                found.append(each)
            elif each.opcode == "fusion":
                found += self._fused_collectives(each)
        return found

    def memory_bytes(self) -> float:
        """Bytes read from and written to a device's memory: operands and results of all that is scheduled, of sliced
        operands the slice, without what lies in on-chip memory."""
        return sum(
            times * self._touched(computation, instruction)
            for computation, times in self.scheduled()
            for instruction in computation.instructions
            if instruction.opcode not in _FREE and not instruction.opcode.endswith("-done")
        )

    def scheduled(self) -> Iterator[tuple[Computation, int]]:
        """Computations whose instructions are issued one by one, and how often each runs."""
        yield from self._from(self.entry, 1)

    def _from(self, name: str, times: int) -> Iterator[tuple[Computation, int]]:
        computation = self.computations[name]
        yield computation, times
        for each in computation.instructions:
            if each.opcode == "while":
                yield from self._from(each.called("body"), times * self._trips(each))
            elif each.opcode == "call":
                yield from self._from(each.called("to_apply"), times)
            elif each.opcode == "conditional":
                for branch in re.findall(r"(?:true|false)_computation=%?([\w.-]+)", each.text):
                    yield from self._from(branch, times)

    def _trips(self, loop: Instruction) -> int:
        """How often a loop runs: what is told, or the constant that its counter is compared with."""
        if told := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text):
            return int(told.group(1))
        condition = self.computations[loop.called("condition")]
        constants = [
            int(found.group(1))
            for each in condition.instructions
            if each.opcode == "constant" and (found := re.match(r"(\d+)\)", each.text))
        ]
        return max(constants, default=1)

    def _inner_text(self, instruction: Instruction) -> str:
        called = instruction.called("calls")
        inner = self.computations.get(called) if called else None
        return " ".join(each.text for each in inner.instructions) if inner else ""

    def _collective(self, instruction: Instruction) -> tuple[str, float] | None:
        """Kind and bytes of the larger side, of a collective or of what starts one."""
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            sizes = [_bytes(shape) for shape in _SHAPE.finditer(instruction.shape)]
            whole = sum(sizes)
            if instruction.opcode.endswith("-start") and kind != "all-reduce":
                whole = max(sizes, default=0)  # operand and result stand side by side
            if kind == "reduce-scatter":
                whole = max(whole, sum(self._operand_bytes(instruction)))
            return kind, whole
        if instruction.opcode == "async-start" and (called := instruction.called("calls")):
            for each in self.computations[called].instructions:
                if each.opcode in COLLECTIVES:
                    return self._collective(each)
        return None

    def _operand_bytes(self, instruction: Instruction) -> list[float]:
        for computation in self.computations.values():
            if computation._by_name().get(instruction.name) is instruction:
                return [
                    sum(map(_bytes, _SHAPE.finditer(computation[name].shape)))
                    for name in instruction.operands
                    if name in computation._by_name()
                ]
        return []

    def _computes_until_done(self, computation: Computation, place: int) -> bool:
        start = computation.instructions[place]
        for each in computation.instructions[place + 1 :]:
            if each.opcode.endswith("-done") and start.name in each.operands:
                return False
            if each.opcode in _COMPUTES:
                return True
        return False

    def _touched(self, computation: Computation, instruction: Instruction) -> float:
        names = computation._by_name()
        if instruction.opcode == "fusion":
            return self._touched_by_fusion(instruction, [names.get(name) for name in instruction.operands])
        if instruction.opcode == "dynamic-slice":
            return 2 * _outside(instruction.shape)
        if instruction.opcode in _UPDATES:
            part = names.get(instruction.operands[_UPDATES[instruction.opcode]])
            return 2 * _outside(part.shape) if part else 0.0
        if instruction.opcode in ("send", "recv"):
            return _outside(instruction.shape)  # the operand stands in it, or the result
        if instruction.opcode.endswith("-start") and instruction.shape.startswith("("):
            return _outside(instruction.shape)  # operands and results stand in it side by side
        return _outside(instruction.shape) + sum(_outside(names[n].shape) for n in instruction.operands if n in names)

    def _touched_by_fusion(self, fusion: Instruction, operands: list[Instruction | None]) -> float:
        """Of operands that are only sliced, the slices; of what is updated in place, the update; of what is only handed
        on, nothing. An asynchronous collective's result counts where it starts."""
        inner = self.computations[fusion.called("calls")]
        if "AsyncCollectiveStart" in inner.instructions[-1].text:
            return sum(_outside(each.shape) for each in self._fused_collectives(fusion))
        read = sum(
            self._read(inner, number, _outside(operand.shape)) for number, operand in enumerate(operands) if operand
        )
        return read + self._written(inner, [_outside_part(part) for part in _SHAPE.finditer(fusion.shape)])

    def _read(self, inner: Computation, number: int, whole: float) -> float:
        """Bytes of a parameter of `whole` bytes that a computation reads."""
        parameter = next((each for each in inner.instructions if each.is_parameter(number)), None)
        names, total = {parameter.name} if parameter else set(), 0.0
        for each in inner.instructions:
            places = [place for place, name in enumerate(each.operands) if name in names]
            if not places or each.opcode == "tuple" or each.opcode in COLLECTIVES:
                continue
            if each.opcode == "bitcast":
                names.add(each.name)
            elif each.opcode in ("dynamic-slice", "gather") and places == [0]:
                total += _outside(each.shape)
            elif each.opcode == "fusion":
                called = self.computations[each.called("calls")]
                total += sum(self._read(called, place, whole) for place in places)
            elif not (each.opcode in _UPDATES and places == [0]):
                return whole
        return min(total, whole)

    def _written(self, inner: Computation, sizes: list[float]) -> float:
        """Bytes that a computation writes, whose results have so many."""
        root = inner.instructions[-1]
        results = root.operands if root.opcode == "tuple" else [root.name]
        return sum(self._written_of(inner, name, size) for name, size in zip(results, sizes, strict=False))

    def _written_of(self, inner: Computation, name: str, size: float) -> float:
        names = inner._by_name()
        each = _behind_bitcasts(names, name)
        if each is None or each.opcode == "parameter" or each.opcode in COLLECTIVES:
            return 0.0
        if each.opcode == "custom-call" and "AsyncCollective" in each.text:
            return 0.0
        if each.opcode == "fusion":
            return min(size, self._written(self.computations[each.called("calls")], [size]))
        if each.opcode in _UPDATES:
            updated = _behind_bitcasts(names, each.operands[0])
            part = names.get(each.operands[_UPDATES[each.opcode]])
            if updated is not None and updated.opcode == "parameter" and part is not None:
                return min(size, _outside(part.shape))
        return size


def _behind_bitcasts(names: dict[str, Instruction], name: str) -> Instruction | None:
    """What made the memory that an instruction stands for."""
    each = names.get(name)
    while each is not None and each.opcode in ("bitcast", "get-tuple-element"):
        each = names.get(each.operands[0])
    return each


def _channel(collective: Instruction) -> str:
    """What all steps of a collective have in common; its name if nothing."""
    found = re.search(r"channel_id=(\d+)", collective.text)
    return found.group(1) if found else collective.name


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    computations, current, entry = {}, None, ""
    for line in text.splitlines():
        if line == "}" or line.startswith("}, execution_thread"):  # a kernel's own description may begin lines so
            current = None
        elif current is None and (head := _COMPUTATION.match(line)):
            current = computations[head.group(2)] = Computation(head.group(2))
            entry = head.group(2) if head.group(1) else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            name, shape, opcode, rest = found.groups()
            arguments = rest.split("), ", 1)[0] if opcode != "parameter" else ""
            current.instructions.append(Instruction(name, shape, opcode, re.findall(r"%([\w.-]+)", arguments), rest))
    return computations, entry


def _bytes(shape: re.Match) -> float:
    name, dimensions, _ = shape.groups()
    bits = _BITS.get(name)
    if bits is None:
        digits = re.search(r"\d+", name)
        bits = int(digits.group()) if digits else 8
    return math.prod(int(size) for size in dimensions.split(",") if size) * bits / 8


def _outside(shape: str) -> float:
    """Bytes of a shape that do not lie in on-chip memory."""
    return sum(map(_outside_part, _SHAPE.finditer(shape)))


def _outside_part(part: re.Match) -> float:
    return 0.0 if _ON_CHIP in (part.group(3) or "") else _bytes(part)


def _groups(text: str, devices: int) -> list[list[int]] | None:
    """Which devices exchange with one another, in any of the three ways in which it is written."""
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", text):
        return [[int(n) for n in pair.split(",")] for pair in re.findall(r"\{(\d+,\d+)\}", pairs.group(1))]
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}", text):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed.group(1))]
    if tiled := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, of, order = (part and [int(n) for n in part.split(",")] for part in tiled.groups())
        ids = np.arange(math.prod(of)).reshape(of)
        return (ids.transpose(order) if order else ids).reshape(shape).tolist()
    if named := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", text):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named.group(1))}
        across = re.findall(r"'(\w+)'", named.group(2))
        order = [*(name for name in axes if name not in across), *across]
        ids = np.arange(math.prod(axes.values())).reshape(tuple(axes.values()))
        ids = ids.transpose([list(axes).index(name) for name in order])
        return ids.reshape(-1, math.prod(axes[name] for name in across)).tolist()
    return None
