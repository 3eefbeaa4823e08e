"""Replies to requests that come one after the other: many at a time (`Server`), or turns of one chat (`Chat`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from omni.generate import Progress
from omni.messages import Message, read_messages
from omni.parts import Part
from omni.prompts import Request, Turn
from omni.reply import Reply
from omni.stopping import StopStrings
from omni.streaming import Event, EventStream
from omni_tokenizers.errors import OmniError, UsageError

if TYPE_CHECKING:
    from omni.bundle import Model

Content = str | Sequence[Part | str | Mapping]
"""What a message says: text, or parts (see `omni.messages.read_messages`)."""


class Server:
    """A running batch of a model, which requests join at any time.

    ```python
    server = model.serve(slots=8)
    number = server.add(Request(["seven"], ["image"]))
    while server.busy:
        for number, event in server.step():
            ...
    ```

    One thread at a time may use it. A request's reply is what it would be alone.
    """

    def __init__(self, model: Model, slots: int, *, capacity: int | None = None, shadows: int | None = None):
        """An idle server; see `omni.generate.Engine.open`."""
        self._model = model
        self._slots = model.engine.open(slots, capacity=capacity, shadows=shadows)
        self._streams: dict[int, EventStream] = {}

    @property
    def busy(self) -> bool:
        """Whether any request waits or is being answered."""
        return self._slots.busy

    def warm_up(self, requests: Sequence[Request] = ()) -> None:
        """Compiles what the transformer needs for requests like these, so that none waits for it; decoders of pictures
        and sounds are compiled with the first of them."""
        self._slots.warm_up(self._model.prepare(requests))

    def add(self, request: Request, turns: Sequence[Turn] | None = None, **pieces) -> int:
        """Lines a request up; returns the number under which its events come.

        Args:
          turns: what its prompt says, where its codes are known already.
          pieces: `picture_rows` and `sound_seconds`, as of `Model.stream`.

        Raises:
          UsageError, OmniError: if it cannot be answered; the others are not disturbed.
        """
        if request.samples != 1:
            raise UsageError("a request to a server gives one reply; add it several times, with other seeds")
        processor, prompts = self._model.processor, self._model.prompts
        stream = EventStream(processor, StopStrings(request.stop or ()), **pieces)
        turns = prompts.turns([request])[0] if turns is None else turns
        prepared = prompts.of_turns(request, turns, self._slots.capacity)
        for modality in [*(request.want or ()), *(["text"] if request.stop else [])]:
            processor.tokenizer(modality)  # that it is missing is said now
        number = self._slots.add(prepared)
        self._streams[number] = stream
        return number

    def cancel(self, number: int) -> None:
        """Drops a request, of which nothing more is heard; one that has ended already is none."""
        self._slots.cancel(number)
        self._streams.pop(number, None)

    def step(self) -> list[tuple[int, Event]]:
        """Emits a few tokens for all that are being answered; what happened, with the numbers of the requests. A reply
        that cannot be decoded ends with an event "error", which says why."""
        hop = min((stream.hop for stream in self._streams.values()), default=None)
        return [
            (progress.number, event)
            for progress in self._slots.step(hop, parts=True)
            for event in self._events(progress)
        ]

    def _events(self, progress: Progress) -> Iterator[Event]:
        """What is new of one request; of what goes wrong with it, the others know nothing."""
        try:
            yield from self._streams[progress.number].of(progress)
        except OmniError as error:
            self._slots.cancel(progress.number)
            yield Event("error", 0, text=str(error))
            del self._streams[progress.number]
            return
        if progress.reply:
            del self._streams[progress.number]


class Chat:
    """A conversation. What the model has read and said is not read again in later turns.

    ```python
    chat = model.chat()
    reply = chat.send("Draw a seven.", want=["image"])
    reply = chat.send(["And what is", picture, "?"], want=["text"])
    ```

    Attributes:
      messages: what was said so far.
    """

    def __init__(self, model: Model, system: Content = (), *, capacity: int | None = None):
        """A conversation that has not begun.

        Args:
          system: what stands before the first message.
          capacity: most tokens of all of it, by default the model's context.
        """
        self._model, self._server = model, Server(model, 1, capacity=capacity)
        said = self._parts(system)
        self.messages: list[Message] = [Message("system", said)] if said else []
        self._turns: list[Turn] = []  # the messages, with codes as the model has read and written them
        self._answering: int | None = None

    def send(self, content: Content, want: Sequence[str] | None = None, **settings) -> Reply:
        """The reply to the next message, a string or a list of parts; `settings` are those of `Model.generate`.

        Raises:
          UsageError, OmniError: as of `Model.generate`; the conversation is then as it was before.
        """
        if pieces := {"picture_rows", "sound_seconds"} & set(settings):
            raise UsageError(f"{min(pieces)} is of streams; send gives the whole reply")
        *_, last = self.stream(content, want, sound_seconds=0, **settings)
        return last.reply

    def stream(self, content: Content, want: Sequence[str] | None = None, **settings) -> Iterator[Event]:
        """The reply as events, as of `Model.stream`. With the last of them the message and the reply become part of the
        conversation. A stream that is left before leaves no trace, nor does a reply that is not well-formed. Of a text
        that a stop string has ended, the model remembers that string, too."""
        pieces = {name: settings.pop(name) for name in ("picture_rows", "sound_seconds") if name in settings}
        said = self._parts(content)
        new = [*(() if self._turns else self.messages), Message("user", said)]
        request = Request(new, want, **settings)
        turns = [*self._turns, *self._model.prompts.turns([request])[0]]
        number = self._server.add(request, turns, **pieces)
        if self._answering is not None:  # a stream that was left
            self._server.cancel(self._answering)
        self._answering = number
        return self._events(number, said, turns)

    def _parts(self, content: Content) -> tuple[Part, ...]:
        return read_messages([{"role": "user", "content": content}], self._model.processor.part)[0].parts

    def _events(self, number: int, said: tuple[Part, ...], turns: list[Turn]) -> Iterator[Event]:
        events: deque[tuple[int, Event]] = deque()
        while self._answering == number:
            if not events:
                events.extend(self._server.step())
                continue
            own, event = events.popleft()
            if own != number:
                continue
            if event.kind in ("end", "error"):
                self._answering = None
            if event.kind == "error":
                raise OmniError(event.text)
            if event.kind == "end" and event.reply.well_formed:
                parts = tuple(event.reply.parts)
                self._turns = [*turns, Turn("assistant", parts, tuple(event.reply.spans))]
                self.messages += [Message("user", said), Message("assistant", parts)]
            yield event
