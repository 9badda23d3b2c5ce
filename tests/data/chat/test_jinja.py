"""The sandbox renders as transformers does, and gives templates no more."""

import pytest

from sft_jax.data.chat import jinja


def render(source, **variables):
  return jinja.render(jinja.compile(source), variables)


def test_blocks_are_trimmed_and_loops_can_break():
  source = "{% for i in [1, 2, 3] %}\n  {% if i == 3 %}{% break %}{% endif %}"
  assert render(source + "\n{{ i }}\n{% endfor %}\n") == "1\n2\n"


def test_tojson_escapes_nothing_and_keeps_order():
  value = {"b": "<ü>", "a": [1, None, True]}
  assert render("{{ v | tojson }}", v=value) == (
    '{"b": "<ü>", "a": [1, null, true]}'
  )
  assert render("{{ {'a': 1} | tojson(indent=2) }}") == '{\n  "a": 1\n}'


def test_generation_blocks_are_plain_text():
  source = "a{% generation %}{{ b }}{% endgeneration %}c"
  assert render(source, b="B") == "aBc"


def test_dates_must_be_pinned():
  source = "{% macro today() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}"
  assert render(source + "{{ today() }}", date="2026-01-31") == "31 Jan 2026"
  with pytest.raises(ValueError, match=r"template_kwargs to \{'date'"):
    render(source + "{{ today() }}")


@pytest.mark.parametrize(
  ("source", "said"),
  [
    ("{{ raise_exception('Only text.') }}", "Only text"),
    ("{{ ''.__class__.__mro__ }}", "SecurityError|Undefined"),
    ("{{ messages.append(1) }}", "SecurityError"),
    ("{% for i in range(1000000) %}{% endfor %}", "OverflowError"),
    ("{{ 'a' * 500000000 }}", "more than"),
    ("{{ 500000000 * 'a' }}", "more than"),
    ("{{ 9 ** 9 ** 9 }}", "powers"),
    ("{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}", "more than"),
    ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ("{{ none.content.x }}", "UndefinedError"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
  ],
)
def test_a_template_that_misbehaves_is_refused(source, said):
  with pytest.raises(jinja.TemplateFailed, match=said):
    render(source, messages=[])


def test_a_template_that_does_not_parse_names_its_line():
  with pytest.raises(ValueError, match="chat template line 2"):
    jinja.compile("fine\n{% for %}")
