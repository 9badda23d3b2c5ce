"""Templates render as in transformers, and none costs more than its limits."""

import resource
import threading
import time

import pytest

import real_templates
from sft_jax.data.chat import sandbox, sandbox_child
from sft_jax.data.chat.options import RenderOptions
from sft_jax.data.chat.template import ChatTemplate
from sft_jax.data.conversation import RowError
from sft_jax.data.encoding import encode
from sft_jax.data.tokenizers import child
from sft_jax.data.tokenizers.tokenizer import load_tokenizer
from tiny_rows import chat
from tiny_tokenizers import CHATML, SHARED, byte_level

_BIG = "{% set b = 'a' * 30000000 %}"
_GROW = "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(99) %}"
_AGAIN = "{% for i in range(99999) %}{% for j in range(99999) %}"
_END = "{% endfor %}{% endfor %}"
ATTACKS = {
  # One expression that makes much.
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
  "ljust": "{{ 'a'.ljust(1000000000) }}",
  "zfill": "{{ '1'.zfill(1000000000) }}",
  "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
  "indent": "{{ 'a\nb' | indent(1000000000) }}",
  "indent by text": "{{ ('a\n' * 999999) | indent('x' * 999) }}",
  "replace": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
  "replace nothing": "{{ ('a' * 99999) | replace('', 'b' * 99999) }}",
  "join": "{{ range(99999) | join('a' * 99999) }}",
  "join method": "{{ ('a' * 99999).join('a' * 99999) }}",
  "batch": "{{ [1] | batch(1000000000, 'x') | list }}",
  "slice": "{{ [1] | slice(1000000000) | list }}",
  "tojson indent": "{{ [1, 2] | tojson(indent=1000000000) }}",
  "tojson separators": (
    "{{ range(99999) | list | tojson(separators=('a' * 99999, ':')) }}"
  ),
  "split": _BIG + "{{ b.split('a') | list | string | length }}{{ b }}",
  "list of text": _BIG + "{{ b | list | string }}",
  "bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
  "power": "{{ 9 ** (9 ** 9) }}",
  "power at compile time": "{% if 9 ** (9 ** 9) %}{% endif %}",
  "shift": "{{ (2 ** 30000000) * (2 ** 30000000) % 7 }}{{ 3 ** 90000000 }}",
  "digits": _GROW + "{% set n.x = (n.x ~ '9') %}{% endfor %}{{ 7 ** 9999999 }}",
  "output": "{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}",
  # Growth, step by step.
  "double by +": _GROW + "{% set n.x = n.x + n.x %}{% endfor %}",
  "double by ~": _GROW + "{% set n.x = n.x ~ n.x %}{% endfor %}",
  "double by %": _GROW + "{% set n.x = '%s%s' % (n.x, n.x) %}{% endfor %}",
  "double by format": (
    _GROW + "{% set n.x = '{0}{0}'.format(n.x) %}{% endfor %}"
  ),
  "double by join": _GROW + "{% set n.x = [n.x, n.x] | join %}{% endfor %}",
  "double by block": (
    _GROW + "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}"
  ),
  "double by macro": (
    "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}"
    + _GROW
    + "{% set n.x = f(n.x) %}{% endfor %}"
  ),
  "double lists": (
    _GROW + "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | string }}"
  ),
  "double lists, as JSON": (
    _GROW + "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | tojson }}"
  ),
  "double lists, compared": (
    "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(60) %}"
    "{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}"
    "{{ n.x == n.y }}"
  ),
  "double dicts": (
    _GROW + "{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}{{ n.x }}"
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
  "loops": _AGAIN + _END,
  "loops of calls": (
    "{% macro f() %}{% endmacro %}" + _AGAIN + "{{ f() }}" + _END
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
  "namespace in a loop": (
    "{% set n = namespace(x=0) %}" + _AGAIN + "{% set n.x = n.x + 1 %}" + _END
  ),
  # Long calls that make nothing.
  "compare": _BIG
  + "{% set c = 'a' * 30000000 %}"
  + _AGAIN
  + "{% if b == c %}{% endif %}"
  + _END,
  "less": _BIG
  + "{% set c = 'a' * 30000000 %}"
  + _AGAIN
  + "{% if b < c %}{% endif %}"
  + _END,
  "sort equals": (
    _BIG + "{% set n = namespace(x=[]) %}{% for i in range(9000) %}"
    "{% set n.x = n.x + [b[1:]] %}{% endfor %}{{ n.x | sort | length }}"
  ),
  "sort of comparisons": (
    "{% set b = 'a' * 3000000 %}{% set c = b ~ 'c' %}{% set d = b ~ 'd' %}"
    "{{ ([d, c] * 30000) | sort(case_sensitive=true) | length }}"
  ),
  "unique": (
    "{% set b = 'a' * 3000000 %}{{ ([b] * 90000) | unique | list | length }}"
  ),
  "groupby": (
    "{% set b = 'a' * 3000000 %}"
    "{{ ([{'k': b ~ 'a'}, {'k': b ~ 'b'}] * 30000) | groupby('k') | length }}"
  ),
  "max": "{% set b = 'a' * 3000000 %}{{ ([b ~ 1, b ~ 2] * 90000) | max }}",
}
for _name, _call in {
  "find": "b.find('aab')", "rfind": "b.rfind('baa')", "in": "'ab' in b",
  "count": "b.count('aa')", "index of": "b.count('ab')",
  "strip": "b.strip('a')", "lstrip": "b.lstrip('a')", "rstrip": "b.rstrip('a')",
  "isalnum": "b.isalnum()", "isalpha": "b.isalpha()", "islower": "b.islower()",
  "isupper": "b.isupper()", "isdecimal": "b.isdecimal()",
  "isspace": "b.isspace()", "istitle": "b.istitle()",
  "isprintable": "b.isprintable()", "isidentifier": "b.isidentifier()",
  "slice of text": "b[1:]", "step of text": "b[::-1]", "every other": "b[::2]",
  "upper": "b.upper()", "lower": "b | lower", "title": "b | title",
  "capitalize": "b | capitalize", "swapcase": "b.swapcase()",
  "casefold": "b.casefold()", "partition": "b.partition('b')",
  "rpartition": "b.rpartition('b')", "startswith": "b.startswith(b[1:])",
  "endswith": "b.endswith(b[1:])", "removeprefix": "b.removeprefix('a')",
  "removesuffix": "b.removesuffix('a')", "splitlines": "b.splitlines()",
  "rsplit": "b.rsplit('b')", "wordcount": "b | wordcount",
  "striptags": "b | striptags", "trim": "b | trim('a')", "escape": "b | escape",
  "urlize": "b | urlize", "wordwrap": "b | wordwrap", "reverse": "b | reverse",
  "translate": "b.translate({97: 'b'})", "encode": "b.encode()",
  "replace one": "b.replace('a', 'b')", "tojson": "b | tojson",
  "urlencode": "b | urlencode", "int": "b | int", "float": "b | float",
  "truncate": "b | truncate(9)", "hash": "{b ~ 'c': 1}",
}.items():  # fmt: skip
  ATTACKS[_name] = f"{_BIG}{_AGAIN}{{% set x = {_call} %}}{_END}"
# The same in every run; all of them in the slow suite.
QUICK = ("repeat", "output", "loops", "sort of comparisons", "strip")


@pytest.mark.parametrize(
  "name",
  [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in ATTACKS
  ],
)
def test_attacks_end_within_their_limits(name, tmp_path):
  folder = tmp_path / "hostile model"
  one = load_tokenizer(byte_level(folder, "{{ bos_token }}" + ATTACKS[name]))
  begin = time.process_time()
  with pytest.raises((RowError, ValueError)) as error:
    encode.encode_row(chat("u:Hi", "a:Yo"), one, RenderOptions(), max_length=99)
  assert "chat template" in str(error.value)
  assert len(str(error.value)) < 5000
  # Here, next to nothing; in the child, what its limits allow.
  assert time.process_time() - begin < 1


def test_over_eighty_attacks_are_tried():
  assert len(ATTACKS) >= 80


def test_a_template_that_always_exceeds_its_limits_is_given_up(monkeypatch):
  monkeypatch.setattr(sandbox, "_strikes", {})
  monkeypatch.setattr(sandbox, "_STRIKES", 1)
  template = ChatTemplate(ATTACKS["loops"])
  with pytest.raises(sandbox.TemplateFailed, match="exceeds 1 s or 400 MiB"):
    template.render([])
  begin = time.perf_counter()
  with pytest.raises(ValueError, match="1 renderings that exceeded"):
    template.render([])
  assert time.perf_counter() - begin < 0.1


def test_only_the_job_that_exceeds_a_limit_is_refused():
  source = (
    "{% for n in messages %}{% for i in range(n) %}{% for j in range(n) %}"
    "{% endfor %}{% endfor %}{{ 'a' * n }}{% endfor %}b"
  )
  jobs = [sandbox.Job([n], {}, [(1, False), (0, True)]) for n in (1, 99_999, 2)]
  assert sandbox.render(source, jobs) == [[None, None]] * 3
  made = [
    [
      sandbox.render(source, [job._replace(cuts=[cut])])[0][0]
      for cut in job.cuts
    ]
    for job in jobs
  ]
  assert [texts[1] for texts in made] == ["b"] * 3
  assert [made[0][0], made[2][0]] == ["ab", "aab"]
  assert isinstance(made[1][0], sandbox.TemplateFailed)
  # What is too much for one trip comes in several.
  source = "{{ 'a' * messages[0] }}b"
  jobs = [sandbox.Job([10_000_000], {}, [(1, False)] * 3)] * 2
  assert [[len(t) for t in job] for job in sandbox.render(source, jobs)] == [
    [10_000_001] * 3
  ] * 2


def test_threads_share_a_child():
  found: list[str] = []
  template = ChatTemplate("{% for i in range(600) %}{% endfor %}{{ messages }}")
  work = lambda number: found.append(template.render([number]))
  threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sorted(found) == [f"[{number}]" for number in range(8)]


def test_too_deep_a_nesting_is_refused_when_compiled():
  for source in (
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{% if a %}" * 3000 + "{% endif %}" * 3000,
    "{% for a in b %}" * 30 + "{% endfor %}" * 30,
    "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "a" * (1 << 21),
  ):
    with pytest.raises(ValueError, match="chat template"):
      ChatTemplate(source)


def render(source, **variables):
  (made,) = sandbox.render(source, [sandbox.Job([], variables, [(0, False)])])
  if isinstance(made[0], Exception):
    raise made[0]
  return made[0]


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
  ("source", "refusal"),
  [
    ("{{ raise_exception('Only text.') }}", "Only text"),
    ("{{ ''.__class__.__mro__ }}", "SecurityError|Undefined"),
    ("{{ messages.append(1) }}", "SecurityError"),
    ("{% for i in range(1000000) %}{% endfor %}", "OverflowError"),
    ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ("{{ none.content.x }}", "UndefinedError"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
  ],
)
def test_a_template_that_misbehaves_is_refused(source, refusal):
  with pytest.raises(sandbox.TemplateFailed, match=refusal):
    render(source)


def test_a_template_that_does_not_parse_names_its_line():
  with pytest.raises(ValueError, match="chat template line 2"):
    ChatTemplate("fine\n{% for %}")


def _long(count: int) -> list[dict]:
  roles = ("user", "assistant")
  return [
    {"role": roles[i % 2], "content": f"turn {i} <b> é"} for i in range(count)
  ]


@pytest.mark.parametrize("name", ["chatml", *real_templates.STOPS])
def test_increments_are_the_renderings_of_each_cut(name):
  if name != "chatml" and not SHARED.is_dir():
    pytest.skip("needs the shared data folder")
  source = CHATML if name == "chatml" else real_templates.source(name)
  for before in ([], [{"role": "system", "content": "Be brief."}]):
    messages = before + _long(40)
    first = len(before) + 1
    cuts = [(i, i % 2 == first % 2) for i in range(first, len(messages) + 1)]
    variables = {"date": "2026-01-31", "tools": None, "bos_token": "<s>"}
    job = sandbox.Job(messages, variables, cuts)
    (made,) = sandbox.render(source, [job])
    alone = [
      sandbox.render(source, [job._replace(cuts=[cut])])[0][0] for cut in cuts
    ]
    assert list(map(str, made)) == list(map(str, alone))


@pytest.mark.parametrize(
  "source",
  [
    "{% for m in messages %}{{ m.content }}{% if not loop.last %},{% endif %}"
    "{% endfor %}",
    "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages[-1].role }}",
    "{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = n.x + 1 %}"
    "{{ m.content }}{% endfor %}{{ n.x }}",
    "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% for m in messages %}{{ m.role }}{% endfor %}",
    "{% for m in messages %}{{ messages[loop.index] is defined }}{% endfor %}",
    "{% if messages is sequence %}{% for m in messages %}{{ m.content }}"
    "{% endfor %}{% endif %}{% for x in [1] %}{% endfor %}",
    "{% for m in messages[:-1] %}{{ m.content }}{% endfor %}",
    "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
    "{% set t %}{% for m in messages %}{{ m.content }}{% endfor %}{% endset %}"
    "{{ t | upper }}",
    "{% if messages[2] is defined %}long{% endif %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{{ m.content }}{% if add_generation_prompt %}!"
    "{% endif %}{% endfor %}",
  ],
)
def test_what_looks_ahead_or_back_is_rendered_cut_by_cut(source):
  cuts = [(i, i % 2 == 1) for i in range(1, 13)]
  job = sandbox.Job(_long(12), {}, cuts)
  (made,) = sandbox.render(source, [job])
  for cut, text in zip(cuts, made, strict=True):
    assert [[text]] == sandbox.render(source, [job._replace(cuts=[cut])])


@pytest.mark.parametrize(
  ("body", "windowed"),
  [
    # As GLM: what is before the last question.
    ("{{ '<>' if loop.index0 > ns.last else '[]' }}{{ m.content }}", True),
    ("{{ m.content }}{% if loop.last %}!{% endif %}", True),
    # What is far away decides.
    ("{{ loop.index }}{{ m.content }}", False),
    ("{{ m.content }}{{ messages | length }}", False),
    ("{{ m.content if loop.revindex > 30 else m.content | upper }}", False),
    ("{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ m.content }}", False),
  ],
)
def test_windows_are_the_renderings_of_each_cut(body, windowed, monkeypatch):
  # Its timer is the child's: here it would end this process.
  monkeypatch.setattr(child, "limit_time", lambda seconds: None)
  source = (
    "{% set ns = namespace(last=0, n=0) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}" + body + "{% endfor %}"
    "{% if add_generation_prompt and ns.last %}:{% endif %}"
  )
  messages = _long(80)
  more = {"role": "user", "content": "Go on."}
  cuts: list = [(i, i % 2 == 1) for i in range(1, 81)]
  cuts += [(i, False, more) for i in range(2, 81, 2)]
  job = sandbox.Job(messages, {}, cuts)
  (made,) = sandbox.render(source, [job])
  for cut, text in zip(cuts, made, strict=True):
    assert [[text]] == sandbox.render(source, [job._replace(cuts=[cut])])
  template = sandbox_child.compile(source)
  assert (
    bool(sandbox_child._by_windows(template, messages, {}, cuts)) == windowed
  )


# Which asks where the last question is, as many of today's do.
_LOOKS_AHEAD = (
  "{% set ns = namespace(last=0) %}{% for m in messages %}"
  "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
  "{% endfor %}" + CHATML + "{{ '' if ns.last else '' }}"
)


@pytest.mark.parametrize("template", [CHATML, _LOOKS_AHEAD])
def test_a_thousand_turns_take_no_more_than_their_length(tmp_path, template):
  one = load_tokenizer(byte_level(tmp_path / "m", template))
  row = chat(*(f"{'ua'[i % 2]}:turn {i}" for i in range(1000)))
  encode.encode_row(chat("u:Hi", "a:Yo"), one, RenderOptions(), max_length=99)
  begin = time.perf_counter()
  made = encode.encode_row(row, one, RenderOptions(), max_length=10**6)
  assert time.perf_counter() - begin < 4  # Under 2 s where nothing else runs.
  (example,) = made.examples
  assert (example.loss_weights > 0).sum() > 1000


@pytest.mark.skipif(
  not hasattr(resource, "prlimit"), reason="asks Linux for another's limits"
)
def test_the_child_is_under_the_limit_of_memory(tmp_path):
  """The kernel's own word: no rendering can take more."""
  one = load_tokenizer(byte_level(tmp_path / "model", CHATML))
  encode.encode_row(chat("u:Hi", "a:Yo"), one, RenderOptions(), max_length=99)
  assert sandbox.CHILD.process is not None
  found = resource.prlimit(sandbox.CHILD.process.pid, resource.RLIMIT_AS)
  assert found == (sandbox.MEMORY, sandbox.MEMORY)
  assert sandbox.MEMORY < 500e6
