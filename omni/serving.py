"""Replies to requests that come one after the other: many at a time (`Server`), or turns of one chat (`Chat`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from omni.grammar import Span
from omni.messages import Message, read_messages
from omni.parts import Part
from omni.prompts import Request
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
        """Compiles what requests like these need, so that none waits for it."""
        self._slots.warm_up(self._model.prepare(requests))

    def add(self, request: Request, messages: Sequence[Sequence[Span]] | None = None, **pieces) -> int:
        """Lines a request up; returns the number under which its events come.

        Args:
          messages: the codes of its prompt, where they are known already.
          pieces: `picture_rows` and `sound_seconds`, as of `Model.stream`.

        Raises:
          UsageError, OmniError: if it cannot be answered; the others are not disturbed.
        """
        if request.samples != 1:
            raise UsageError("a request to a server gives one reply; add it several times, with other seeds")
        stream = EventStream(self._model.processor, StopStrings(request.stop), **pieces)
        preparer = self._model.preparer
        messages = preparer.spans([request])[0] if messages is None else messages
        number = self._slots.add(preparer.prepared(request, messages))
        self._streams[number] = stream
        return number

    def cancel(self, number: int) -> None:
        """Drops a request, of which nothing more is heard; one that has ended already is none."""
        self._slots.cancel(number)
        self._streams.pop(number, None)

    def step(self) -> list[tuple[int, Event]]:
        """Emits a few tokens for all that are being answered; what happened, with the numbers of the requests."""
        hop = min((stream.hop for stream in self._streams.values()), default=None)
        events: list[tuple[int, Event]] = []
        for progress in self._slots.step(hop, parts=True):
            stream = self._streams[progress.number]
            found = [*stream.push(progress.ids)]
            if progress.reply:
                found += stream.end(progress.reply)
                del self._streams[progress.number]
            events += [(progress.number, event) for event in found]
        return events


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
        self._model, self._server = model, Server(model, 1, capacity=capacity, shadows=2)
        self._system = self._parts(system)
        self.messages: list[Message] = [Message("system", self._system)] if self._system else []
        self._spans: list[list[Span]] = []  # of the messages, as the model has read and written them
        self._answering: int | None = None

    def send(self, content: Content, want: Sequence[str] | None = None, **settings) -> Reply:
        """The reply to the next message, a string or a list of parts; `settings` are those of `Model.generate`.

        Raises:
          UsageError, OmniError: as of `Model.generate`; the conversation is then as it was before.
        """
        *_, end = self.stream(content, want, picture_rows=0, sound_seconds=0, **settings)
        return end.reply

    def stream(self, content: Content, want: Sequence[str] | None = None, **settings) -> Iterator[Event]:
        """The reply as events, as of `Model.stream`. With the last of them the message and the reply become part of the
        conversation; a stream that is left before leaves no trace."""
        pieces = {name: settings.pop(name) for name in ("picture_rows", "sound_seconds") if name in settings}
        said = self._parts(content)
        request = Request([*(() if self._spans else self._system), *said], want, **settings)
        messages = [*self._spans, *self._model.preparer.spans([request])[0]]
        if self._answering is not None:  # a stream that was left
            self._server.cancel(self._answering)
        self._answering = self._server.add(request, messages, **pieces)
        return self._events(said, messages)

    def _parts(self, content: Content) -> tuple[Part, ...]:
        return read_messages([{"role": "user", "content": content}], self._model.processor.part)[0].parts

    def _events(self, said: tuple[Part, ...], messages: list[list[Span]]) -> Iterator[Event]:
        own = self._answering
        while self._answering == own and self._server.busy:
            for _, event in self._server.step():
                if event.reply:
                    self._keep(said, messages, event.reply)
                yield event

    def _keep(self, said: tuple[Part, ...], messages: list[list[Span]], reply: Reply) -> None:
        self._answering = None
        if not reply.well_formed:
            raise OmniError("the reply is no document, so the conversation cannot go on after it; ask once more")
        self._spans = [*messages, reply.spans]
        self.messages += [Message("user", said), Message("assistant", tuple(reply.parts))]
