"""Jinja templates from elsewhere, rendered in a sandbox, with what transformers gives chat templates.

A template sees strings, numbers, lists and mappings, no object of this program. It is stopped after `SECONDS`, which is
looked at whenever it goes round a loop, calls a macro or puts something out, and after `CHARACTERS`. What is not
bounded is the memory that a single expression takes, such as a string that is padded or joined.
"""

from __future__ import annotations

import datetime
import json
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from omni_tokenizers.errors import OmniError

SECONDS, CHARACTERS, BITS = 30.0, 1 << 24, 1 << 16
"""Most that a template may take, put out, and have in one number."""

FIRST_SIGN = "\U0010f000"
"""From here on characters are no letters but stand for tokens and breaks (`omni.chat_template`), also within JSON."""
_LETTERS = re.compile(f"[^\0-\x7f{FIRST_SIGN}-\U0010ffff]+")  # beyond ASCII

Render = Callable[[Mapping[str, Any]], str]


class _Refusal(TemplateError):
    """What a template itself finds wrong."""


class _Rounds(Extension):
    """Looks at the clock where a template goes round; reads `{% generation %}`, which marks what a model has said."""

    tags = frozenset(["generation"])

    def parse(self, parser: Parser) -> nodes.Node:
        """A block that is put out as it is."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("unchanged"), [], [], body).set_lineno(line)

    def unchanged(self, caller: Callable[[], str]) -> str:
        """The content of a block."""
        return caller()

    def look(self) -> str:
        """Nothing; `TemplateError` when the time is over."""
        if time.monotonic() > self.environment.deadline:
            raise TemplateError(f"it takes longer than {SECONDS:g} seconds")
        return ""

    def watch(self, tree: nodes.Template) -> None:
        """Puts a look at the clock wherever a template may go round."""
        for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            node.body.insert(0, nodes.ExprStmt(self.call_method("look")).set_lineno(node.lineno))
        tree.set_environment(self.environment)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's own, without numbers and repetitions beyond all measure."""

    intercepted_binops = frozenset(["*", "**"])

    def __init__(self):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Rounds, "jinja2.ext.loopcontrols"])
        self.deadline = 0.0
        self.filters["tojson"] = _tojson
        self.globals |= {"raise_exception": _refuse, "strftime_now": _now, "namespace": _Namespace}
        del self.globals["lipsum"]

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The product or power, if it is not too large."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > BITS:
                raise TemplateError("a number has become too large")
        elif operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(times, int) and not isinstance(sequence, float) and len(sequence) * times > CHARACTERS:
                    raise TemplateError("a repetition is too long")
        return super().call_binop(context, operator, left, right)


def compile_template(source: str, rewrite: Callable[[str], str]) -> Render:
    """What renders a template with the variables that it is given.

    Args:
      rewrite: changes each string that stands in the template: what it puts out, and its constants.

    Raises:
      OmniError: it is none, and when it is rendered, whatever goes wrong, with the template's own message.
    """
    environment = _Sandbox()
    try:
        tree = environment.parse(source)
        for node in tree.find_all(nodes.TemplateData):
            node.data = rewrite(node.data)
        for node in tree.find_all(nodes.Const):
            node.value = rewrite(node.value) if isinstance(node.value, str) else node.value
        environment.extensions[_Rounds.identifier].watch(tree)
        template = environment.from_string(tree)
    except Exception as error:  # whatever a stranger's template makes of the compiler
        raise OmniError(f"the chat template cannot be read: {error}") from None

    def render(variables: Mapping[str, Any]) -> str:
        environment.deadline = time.monotonic() + SECONDS
        pieces, characters = [], 0
        try:
            for piece in template.generate(**variables):
                environment.extensions[_Rounds.identifier].look()
                pieces.append(piece)
                characters += len(piece)
                if characters > CHARACTERS:
                    raise TemplateError(f"it puts out more than {CHARACTERS} characters")
        except _Refusal as error:
            raise OmniError(f"the chat template refuses these messages: {error}") from None
        except Exception as error:  # what Jinja and Python make of a stranger's expressions
            raise OmniError(f"the chat template fails ({type(error).__name__}: {error})") from None
        return "".join(pieces)

    return render


class _Namespace(Namespace):
    """Variables that loops may set; no name of Python's own."""

    def __init__(*args, **kwargs):
        if hidden := [name for name in dict(*args[1:], **kwargs) if str(name).startswith("_")]:
            raise TemplateError(f"a namespace has no {hidden[0]!r}")
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise TemplateError(f"a namespace has no {name!r}")
        super().__setitem__(name, value)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators=None, sort_keys=False) -> str:
    """JSON as it is: Jinja's own filter escapes what HTML does not allow."""
    found = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    return _LETTERS.sub(lambda letters: json.dumps(letters[0])[1:-1], found) if ensure_ascii else found


def _refuse(message: str) -> None:
    raise _Refusal(message)


def _now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
