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
