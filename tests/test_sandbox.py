"""Templates from elsewhere: what they are given, and where they are stopped."""

import json
import time

import pytest

from omni import sandbox
from omni.sandbox import compile_template
from omni_tokenizers.errors import OmniError


def rendered(source, **variables) -> str:
    return compile_template(source, lambda text: text)(variables)


def test_templates_have_what_transformers_gives_them():
    """Tags on lines of their own leave nothing behind; generation, break, tojson, namespaces, dict and the date."""
    source = "{% for each in given %}\n  {% if each == 2 %}\n  {% break %}\n  {% endif %}\n{{ each }}\n{% endfor %}\n"
    assert rendered(source, given=[0, 1, 2, 3]) == "0\n1\n"
    assert rendered("{% generation %}{{ x }}{% endgeneration %}", x="<é>") == "<é>"
    assert json.loads(rendered("{{ x | tojson(indent=2) }}", x={"a": "<é'>"})) == {"a": "<é'>"}
    assert rendered("{{ x | tojson }}", x="<é'>") == '"<é\'>"'
    counted = "{% set n = namespace(a=1) %}{% for i in range(3) %}{% set n.a = n.a * 2 %}{% endfor %}{{ n.a }}"
    assert rendered(counted) == "8" and rendered("{{ dict(a=1).a }}") == "1"
    assert rendered("{{ strftime_now('%Y') }}") in (time.strftime("%Y"), str(int(time.strftime("%Y")) - 1))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no system here') }}", "refuses these messages: no system here"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ raise_exception.__globals__['json'] }}", "fails"),
        ("{{ given.append(1) }}", "unsafe"),
        ("{% set n = namespace() %}{% set n.__x = 1 %}", "has no '__x'"),
        ("{% set n = namespace(_x=1) %}", "has no '_x'"),
        ("{{ namespace().__init__ }}{{ namespace.__globals__.x }}", "fails"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ lipsum(5) }}", "undefined"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ given + 1 }}", "TypeError"),
        ("{% for %}", "cannot be read"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "cannot be read"),
        # Where they would go on for ever, or nearly so
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{% for a in given recursive %}{{ loop(given) }}{% endfor %}", "RecursionError"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "longer than 0.3 seconds"),
        (
            "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(99) }}",
            "longer than 0.3 seconds",
        ),
        ("{% for a in range(99999) %}{{ given * 1000 }}{% endfor %}", "more than 100000 characters"),
        ("{{ range(10 ** 9) | list }}", "Range too big"),
        ("{{ 9 ** (9 ** 9) }}", "too large"),
        ("{% set n = namespace(a=9) %}{% for i in range(99) %}{% set n.a = n.a * n.a %}{% endfor %}", "too large"),
        ("{{ 'a' * 10 ** 12 }}", "too long"),
        ("{{ 10 ** 12 * given }}", "too long"),
    ],
)
def test_what_goes_wrong_is_one_line_and_soon(monkeypatch, source, message):
    """Whatever a template does, it ends, as an error with its reason."""
    monkeypatch.setattr(sandbox, "SECONDS", 0.3 if "seconds" in message else 60.0)
    monkeypatch.setattr(sandbox, "CHARACTERS", 100_000)
    started = time.process_time()
    with pytest.raises(OmniError, match=message) as caught:
        rendered(source, given=["a"])
    assert time.process_time() - started < 5 and "\n" not in str(caught.value)
