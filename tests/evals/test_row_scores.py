"""Scores in packs equal those of each document alone, computed by hand."""

import jax
import numpy as np
import pytest

import tiny
from fake_store import fake_store
from sft_jax.common import sharding
from sft_jax.data.chat import options
from sft_jax.data.store import build
from sft_jax.data.tokenizers.tokenizer import load_tokenizer
from sft_jax.evals import row_scores
from sft_jax.models.hf import load_save

TALK = {
  "messages": [
    {"role": role, "content": text}
    for role, text in (
      ("user", "Where is the cat?"),
      ("assistant", "On the mat."),
      ("user", "And the dog?"),
      ("assistant", "The dog ran to the house on the hill."),
    )
  ]
}
WEIGHED = {
  "messages": [
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "I am well.", "weight": 0.25},
  ]
}
ROWS = [*tiny.ROWS[:5], TALK, WEIGHED, {"text": "The town is on the hill."}]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """(folder of a model, tokenizer, {'keep', 'split'}: store of ROWS)."""
  root = tmp_path_factory.mktemp("scores")
  folder = tiny.model_folder(root / "tiny")
  tokenizer = load_tokenizer(folder)
  file = tiny.rows_file(root / "rows.jsonl", ROWS)
  stores = {
    history: build.build(
      str(file),
      tokenizer,
      options.RenderOptions(history=history),
      directory=root / "cache",
      max_length=64,
      num_workers=1,
      log=lambda line: None,
    )
    for history in ("keep", "split")
  }
  return folder, tokenizer, stores


def score(folder, store, bos_id, *, mesh=None, **choices):
  mesh = mesh or sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  model, params = load_save.load_pretrained(folder, mesh=mesh)
  choices = {"seq_len": 64, "batch_size": 8} | choices
  return row_scores.score(
    store,
    model,
    params,
    bos_id=bos_id,
    mesh=mesh,
    log=lambda line: None,
    **choices,
  )


def nll_of(folder):
  """ids -> -log p of ids[1:], each from those before it, in float64."""
  model, params = load_save.load_pretrained(folder)
  forward = jax.jit(lambda t: model.logits(params, model.hidden(params, t)))

  def nll(ids):
    # Causal: what is after a document changes nothing, and one shape compiles.
    padded = np.zeros((1, 65), np.int32)
    padded[0, : len(ids)] = ids
    logits = np.asarray(forward(padded), np.float64)[0]
    top = logits.max(-1, keepdims=True)
    log_z = top[:, 0] + np.log(np.exp(logits - top).sum(-1))
    at = np.arange(len(ids) - 1)
    return log_z[at] - logits[at, np.asarray(ids)[1:]]

  return nll


def by_hand(store, bos_id, nll):
  """{row: [nats, ifd, alone, tokens]}, turn by turn in plain loops."""
  found = {}
  for i in range(len(store.index)):
    example, row = store.example(i), int(store.index["row"][i])
    ids, on = example.tokens.tolist(), example.loss_weights != 0
    sums = found.setdefault(row, np.zeros(5))
    loss = np.concatenate([[0.0], nll(ids)])
    sums[:2] += loss[on].sum(), on.sum()
    if store.index["text"][i]:
      continue
    turn = []
    for at in range(len(ids) + 1):
      if at < len(ids) and on[at]:
        turn.append(at)
      elif turn:
        alone = [ids[k] for k in turn]
        if bos_id is None:  # Nothing predicts the first.
          paired = turn[1:]
        else:
          alone, paired = [bos_id, *alone], turn
        if paired:
          sums[2:4] += loss[paired].sum(), nll(alone).sum()
          sums[4] += len(paired)
        turn = []
  rows = []
  for nats, tokens, asked, alone, paired in found.values():
    ifd = (asked / alone, alone / paired) if paired else (None, None)
    rows.append((nats / tokens, *ifd, tokens))
  return rows


def check(found, want):
  assert len(found) == len(want)
  for row, values in zip(found, want, strict=True):
    for a, b in zip(row.values, values, strict=True):
      assert a == (b if b is None else pytest.approx(b, rel=2e-5, abs=2e-6))


@pytest.mark.parametrize("history", ["keep", "split"])
@pytest.mark.parametrize("bos", [None, 1])
def test_packed_scores_are_those_of_each_row_alone(made, history, bos):
  folder, _, stores = made
  store = stores[history]
  found = score(folder, store, bos)
  check(found, by_hand(store, bos, nll_of(folder)))
  assert [row.place for row in found] == [
    f"rows.jsonl:{i + 1}" for i in range(len(ROWS))
  ]
  assert [row.content for row in found] == list(
    dict.fromkeys(store.index["content"].tolist())
  )
  # The text has no prompt; the talk's turns count together.
  assert [row.values[1] is None for row in found] == [False] * 7 + [True]


@pytest.mark.parametrize(
  "sizes", [(8, 1, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2)], ids=str
)
def test_on_a_mesh_and_in_other_packs(made, sizes):
  folder, _, stores = made
  want = score(folder, stores["keep"], 1)
  mesh = sharding.make_mesh(*sizes)
  found = score(
    folder, stores["keep"], 1, mesh=mesh, seq_len=96, chunk_tokens=7
  )
  check(found, [row.values for row in want])


def test_as_transformers_has_it(made):
  torch = pytest.importorskip("torch", reason="live oracle: needs torch")
  transformers = pytest.importorskip("transformers", reason="live oracle")
  folder, _, stores = made
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32
  ).eval()

  def nll(ids):
    with torch.no_grad():
      logits = theirs(torch.tensor([ids])).logits[0, :-1].double()
    wanted = torch.tensor(ids[1:])
    return torch.nn.functional.cross_entropy(
      logits, wanted, reduction="none"
    ).numpy()

  for bos in (None, 1):
    check(score(folder, stores["keep"], bos), by_hand(stores["keep"], bos, nll))


def test_the_turns_that_are_read_alone():
  store = fake_store(
    [
      (list(range(8)), [0, 0, 1, 1, 0, 0, 0.5, 1]),
      ([5, 6, 7], [0, 1, 1]),  # No prompt but a first token.
      ([5, 6, 7], [0, 0, 1]),
    ]
  )
  for bos, turns in (
    (None, [(0, 2, 4, 2), (0, 6, 8, 2)]),
    (9, [(0, 2, 4, 3), (0, 6, 8, 3), (2, 2, 3, 2)]),
  ):
    found = row_scores.documents(store, bos)
    assert list(zip(*found, strict=True)) == [
      (0, -1, 0, 8), (1, -1, 0, 3), (2, -1, 0, 3), *turns
    ]  # fmt: skip


def test_a_loss_that_is_no_number_is_named(made):
  folder, _, stores = made
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  model, params = load_save.load_pretrained(folder, mesh=mesh)
  params = jax.tree.map(lambda x: x * np.nan, params)
  with pytest.raises(ValueError, match=r"rows\.jsonl:1: got a loss of nan"):
    row_scores.score(
      stores["keep"], model, params, bos_id=1, seq_len=64, batch_size=8,
      mesh=mesh, log=lambda line: None,
    )  # fmt: skip
