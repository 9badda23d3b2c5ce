"""Templates that would take all time or memory are refused before they do."""

import tracemalloc

import pytest

from sft_jax.data.chat import budget, jinja

DOUBLING = "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(99) %}"
ATTACKS = {
  # One expression.
  "repeat": "{{ 'a' * 500000000 }}",
  "repeat list": "{{ [1] * 500000000 }}",
  "repeat twice": "{{ ('a' * 9999999) * 99 }}",
  "percent": "{{ '%1000000000d' % 1 }}",
  "percent precision": "{{ '%.1000000000f' % 1 }}",
  "percent star": "{{ '%*d' % (1000000000, 1) }}",
  "format method": "{{ '{:>1000000000}'.format('x') }}",
  "format nested": "{{ '{:>{}}'.format('x', 1000000000) }}",
  "format map": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
  "format filter": "{{ '%1000000000d' | format(1) }}",
  "center": "{{ 'a' | center(1000000000) }}",
  "center method": "{{ 'a'.center(1000000000) }}",
  "ljust": "{{ 'a'.ljust(1000000000) }}",
  "zfill": "{{ '1'.zfill(1000000000) }}",
  "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
  "indent": "{{ 'a\nb' | indent(1000000000) }}",
  "indent by text": "{{ ('a\n' * 999999) | indent('x' * 999) }}",
  "replace": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
  "replace filter": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
  "replace nothing": "{{ ('a' * 99999) | replace('', 'b' * 99999) }}",
  "join": "{{ range(99999) | join('a' * 99999) }}",
  "join method": "{{ ('a' * 99999).join('a' * 99999) }}",
  "batch": "{{ [1] | batch(1000000000, 'x') | list }}",
  "slice": "{{ [1] | slice(1000000000) | list }}",
  "round": "{{ 1.5 | round(1000000000, 'ceil') }}",
  "tojson indent": "{{ [1, 2] | tojson(indent=1000000000) }}",
  "tojson separators": (
    "{{ range(99999) | list | tojson(separators=('a' * 99999, ':')) }}"
  ),
  "split": "{{ ('a ' * 9999999).split() | length }}",
  "list of text": "{{ ('a' * 9999999) | list | length }}",
  "sum of lists": "{{ [[1]] | sum(start=[1]) }}",
  "bytes": "{{ 'a'.encode() }}",
  "to_bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
  "translate": "{{ 'a'.translate({97: 'b'}) }}",
  "power": "{{ 9 ** 9 ** 9 }}",
  "lipsum": "{{ lipsum(n=1000000) }}",
  "range": "{{ range(1000000000) | list }}",
  # Growth, step by step.
  "double by +": DOUBLING + "{% set n.x = n.x + n.x %}{% endfor %}",
  "double by ~": DOUBLING + "{% set n.x = n.x ~ n.x %}{% endfor %}",
  "double by %": DOUBLING + "{% set n.x = '%s%s' % (n.x, n.x) %}{% endfor %}",
  "double by format": (
    DOUBLING + "{% set n.x = '{0}{0}'.format(n.x) %}{% endfor %}"
  ),
  "double by join": DOUBLING + "{% set n.x = [n.x, n.x] | join %}{% endfor %}",
  "double by block": (
    DOUBLING + "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}"
  ),
  "double by macro": (
    "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}"
    + DOUBLING
    + "{% set n.x = f(n.x) %}{% endfor %}"
  ),
  "double lists": DOUBLING + "{% set n.x = [n.x, n.x] %}{% endfor %}",
  "double tuples": DOUBLING + "{% set n.x = (n.x, n.x) %}{% endfor %}",
  "double dicts": (
    DOUBLING + "{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}"
  ),
  "double by dict()": (
    DOUBLING + "{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}"
  ),
  "double by list +": (
    "{% set n = namespace(x=[1]) %}{% for i in range(99) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}"
  ),
  "square numbers": (
    "{% set n = namespace(x=99) %}{% for i in range(99) %}"
    "{% set n.x = n.x * n.x %}{% endfor %}"
  ),
  "large in a macro": (
    "{% macro f(x) %}{% for i in range(9999) %}{{ x }}{% endfor %}"
    "{% endmacro %}{{ f('a' * 99999) | length }}"
  ),
  "text in a macro": (
    "{% macro f() %}{% for i in range(9999) %}"
    + "a" * 99999
    + "{% endfor %}{% endmacro %}{{ f() | length }}"
  ),
  "large in a block": (
    "{% set x %}{% for i in range(9999) %}{{ 'a' * 99999 }}{% endfor %}"
    "{% endset %}{{ x | length }}"
  ),
  # Work without end.
  "loops": (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
    "{% endfor %}"
  ),
  "loops of calls": (
    "{% macro f() %}{% endmacro %}{% for a in range(99999) %}"
    "{% for b in range(99999) %}{{ f() }}{% endfor %}{% endfor %}"
  ),
  "costly loops": (
    "{% for a in range(99999) %}{% set x = range(99999) | list %}{% endfor %}"
  ),
  "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
  "two macros": (
    "{% macro f() %}{{ g() }}{% endmacro %}"
    "{% macro g() %}{{ f() }}{{ f() }}{% endmacro %}{{ g() }}"
  ),
  "tree of macros": (
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}"
  ),
  "recursive loop": (
    "{% for x in [1, 1] recursive %}{{ loop([1, 1]) }}{% endfor %}"
  ),
}


def refused(name):
  """Renders an attack; the refusal, and the most memory that it took."""
  tracemalloc.start()
  try:
    with pytest.raises((jinja.TemplateFailed, ValueError)) as error:
      jinja.render(jinja.compile(ATTACKS[name]), {})
    return str(error.value), tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_refused_within_bounds(name, monkeypatch):
  # The limits in proportion; the instrumented code of a test is slow.
  monkeypatch.setattr(budget, "MAX_STEPS", 4_000)
  monkeypatch.setattr(budget, "MAX_CHARACTERS", 1 << 21)
  monkeypatch.setattr(budget, "_MAX_WRITTEN", 1 << 24)
  monkeypatch.setattr(budget, "MAX_THINGS", 1 << 14)
  said, peak = refused(name)
  assert "MemoryError" not in said
  assert peak < 1 << 26, f"{peak} bytes; {said}"


@pytest.mark.parametrize(
  ("source", "text"),
  [
    ("{{ 'a' ~ 1 ~ none }}", "a1None"),
    ("{{ 'a' + b + 'c' + b }}", "aBcB"),
    ("{{ b + b }}{{ [b] + [1] }}{{ 1 + 2 }}", "BB['B', 1]3"),
    ("{{ {'a': b, 'c': [b]} | tojson }}", '{"a": "B", "c": ["B"]}'),
    ("{% set x %}a{{ b }}{% endset %}{{ x | upper }}", "AB"),
    ("{% set x | upper %}a{{ b }}{% endset %}{{ x }}", "AB"),
    ("{% for a, c in [(b, 1), (b, 2)] %}{{ a }}{{ c }}{% endfor %}", "B1B2"),
    ("{{ '%s-%03d' % (b, 7) }} {{ '%s' | format(b) }}", "B-007 B"),
    ("{{ '{} {x:>3}'.format(b, x=1) }}", "B   1"),
    ("{{ ['a', b] | join(', ') }}{{ ', '.join(['a', b]) }}", "a, Ba, B"),
    ("{{ [{'a': b}] | join(', ', attribute='a') }}", "B"),
    ("{{ 'a b'.split() | length }}{{ 'a--b'.split('--')[1] }}", "2b"),
    ("{{ [3, 1] | sort | map('string') | join }}", "13"),
    ("{{ 'x\ny' | indent(2) }}|{{ 'x' | center(3) }}", "x\n  y| x "),
    ("{{ [1, 2, 3] | batch(2) | list }}", "[[1, 2], [3]]"),
    ("{{ 'aXa' | replace('a', b) }}{{ 'aXa'.replace('a', b, 1) }}", "BXBBXa"),
    ("{{ 1.256 | round(1) }}{{ [1, 2] | sum }}", "1.33"),
    ("{% macro f(x) %}<{{ x }}{{ caller() }}>{% endmacro %}"
     "{% call f(b) %}!{% endcall %}", "<B!>"),
    ("{% filter upper %}a{{ b }}{% endfilter %}", "AB"),
    ("{% for i in [1, [2]] recursive %}{{ loop(i) if i is iterable else i }}"
     "{% endfor %}", "12"),
  ],
)  # fmt: skip
def test_what_templates_do_is_as_it_was(source, text):
  assert jinja.render(jinja.compile(source), {"b": "B"}) == text


def test_too_deep_a_nesting_is_refused_when_compiled():
  for source in (
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{% if a %}" * 3000 + "{% endif %}" * 3000,
    "{% for a in b %}" * 30 + "{% endfor %}" * 30,
    "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "a" * (1 << 21),
  ):
    with pytest.raises(ValueError, match="chat template"):
      jinja.compile(source)
