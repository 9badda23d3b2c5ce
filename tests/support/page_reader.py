"""A page as a test reads it, and text that tries to be more than text."""

from html.parser import HTMLParser

HOSTILE = [
  "<script>alert(1)</script>",
  '"><img src=x onerror=alert(1)>',
  "' onmouseover='alert(1)",
  "</pre></article><iframe src='//evil'>",
  "</style><style>*{background:url(//evil)}",
  "</title><script>1</script>",
  "<!-- ",
  "&lt;b&gt; &amp;amp; &#x3c;",
  "$body ${title} {body} %s $$",
  "]]> <svg/onload=alert(1)>",
  "javascript:alert(1)",
  "line\nbreak\ttab  two spaces",
]

# What has opened pages of others: each marks the window if it runs.
_MARK = "top.pwned=(top.pwned||0)+1"
INJECTIONS = [
  f"<script>{_MARK}</script>",
  f"</title><script>{_MARK}</script>",
  f"</style><script>{_MARK}</script>",
  f"</pre></div></article><script>{_MARK}</script>",
  f"--><script>{_MARK}</script><!--",
  f"]]><script>{_MARK}</script>",
  f"</script><script>{_MARK}</script>",
  f"<scr<script>ipt>{_MARK}</scr</script>ipt>",
  f"<SCRIPT\t>{_MARK}</SCRIPT >",
  f"<script\x00>{_MARK}</script>",
  f"\ufeff<script>{_MARK}</script>",
  f"&lt;script&gt;{_MARK}&lt;/script&gt;",
  f"&#60;script&#62;{_MARK}&#60;/script&#62;",
  f"\\u003cscript\\u003e{_MARK}",
  f"%3Cscript%3E{_MARK}%3C/script%3E",
  f"{{{{ self._TemplateReference__context.name }}}}<script>{_MARK}</script>",
  f"{{% raw %}}<script>{_MARK}</script>{{% endraw %}}",
  "{{ 7 * 7 }}{% for x in range(9) %}x{% endfor %}{# gone #}",
  "$body ${title} #{7*7} <%= 7*7 %>",
  f"<svg><script>{_MARK}</script></svg>",
  f"<svg/onload={_MARK}>",
  f"<svg><animate onbegin={_MARK} attributeName=x dur=1s>",
  f"<svg><a xlink:href='javascript:{_MARK}'><text>x</text></a></svg>",
  f"<math><mtext><script>{_MARK}</script></mtext></math>",
  f"<noscript><p title='</noscript><script>{_MARK}</script>'>",
  f"<template><script>{_MARK}</script></template>",
  *(
    f"<{tag} src=x {event}={_MARK}>"
    for tag, event in (
      ("img", "onerror"),
      ("video", "onerror"),
      ("audio", "onerror"),
      ("iframe", "onload"),
      ("embed", "onload"),
      ("input type=image", "onerror"),
    )
  ),
  f"<body onload={_MARK}>",
  f"<details open ontoggle={_MARK}>",
  f"<input autofocus onfocus={_MARK}>",
  f"<marquee onstart={_MARK}>x</marquee>",
  f"<p style='animation:x' onanimationstart={_MARK}>",
  *(
    f"{quote}><img src=x onerror={_MARK}>"
    for quote in ('"', "'", "`", "&quot;", "&#34;")
  ),
  *(f"{quote} onmouseover={quote}{_MARK}" for quote in ('"', "'")),
  f"javascript:{_MARK}",
  f"data:text/html,<script>{_MARK}</script>",
  f"<a href='javascript:{_MARK}'>x</a>",
  f"<iframe srcdoc='<script>{_MARK}</script>'></iframe>",
  f"<object data='data:text/html,<script>{_MARK}</script>'></object>",
  f"<meta http-equiv=refresh content='0;url=javascript:{_MARK}'>",
  "<base href='//evil.invalid/'><link rel=stylesheet href=x>",
  "<style>@import '//evil.invalid/x'; *{display:none}</style>",
  "</style><style>body{background:url(//evil.invalid/x)}",
  f"<form action='javascript:{_MARK}'><button autofocus>x</button></form>",
]


class Page(HTMLParser):
  """Tags, attributes and text, with the check that every tag is closed."""

  VOID = ("meta",)

  def __init__(self, page: str):
    super().__init__()
    self.tags: list[str] = []
    self.attributes: list[tuple[str, str | None]] = []
    self.text: list[str] = []
    self.open: list[str] = []
    self.feed(page)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text.append(data)


def assert_alone(page: Page, text: str) -> None:
  """Nothing is loaded, nothing runs; a policy forbids what slipped through."""
  assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
  names = {name for name, _ in page.attributes}
  assert not {"src", "style"} & names
  assert not any(name.startswith("on") for name in names)
  links = [value or "" for name, value in page.attributes if name == "href"]
  # A line of links within the page, and nowhere else.
  assert all(link.startswith("#part-") for link in links)
  anchors = [value for name, value in page.attributes if name == "id"]
  assert [f"#{anchor}" for anchor in anchors] == links
  assert "default-src 'none'" in text
  assert "http" not in text.replace("http-equiv", "")
