"""A budget is spent by one rendering, and is there whole for the next."""

import threading

from sft_jax.data.chat import budget, jinja


def test_a_budget_is_of_one_rendering_and_one_thread(monkeypatch):
  monkeypatch.setattr(budget, "MAX_STEPS", 1000)
  template = jinja.compile("{% for i in range(600) %}{% endfor %}done")
  assert [jinja.render(template, {}) for _ in range(3)] == ["done"] * 3
  found = []
  threads = [
    threading.Thread(target=lambda: found.append(jinja.render(template, {})))
    for _ in range(4)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert found == ["done"] * 4
