"""What a run looks at of its held-out rows: losses of each, and replies."""

from typing import Any

from sft_jax.common import trees
from sft_jax.evals import row_losses
from sft_jax.inference import generate
from sft_jax.training.build.build import Setup, batches_on
from sft_jax.training.build.data import Config


def losses(
  run_: Setup, params: trees.Tree, measured: tuple[int, int] | None = None
) -> list[dict[str, Any]]:
  """Held-out examples by loss, the worst first; see `row_losses`.

  `measured` tells how many batches of how many; None is all.
  """
  if run_.held_out is None:
    return []
  return row_losses.hardest_first(
    *(params, run_.held_out, run_.tokenizer),
    loss=run_.document_loss,
    batches=lambda stream: batches_on(run_.mesh, stream),
    most_batches=measured[0] if measured else None,
  )


def replies(
  config: Config, run_: Setup, params: trees.Tree
) -> dict[str, list[dict[str, Any]]]:
  """{'replies': `eval.samples` of them} of a run without behaviours."""
  if run_.items or run_.held_out is None or not config.eval.samples:
    return {}
  made = generate.answer_rows(
    *(run_.model, params, run_.tokenizer, run_.held_out.store),
    number=config.eval.samples,
    max_new_tokens=config.eval.max_new_tokens,
    mesh=run_.mesh,
  )
  return {"replies": made}


def samples(
  before: dict[str, Any], after: dict[str, Any]
) -> list[dict[str, Any]]:
  """The replies of two measurements as `measure.compare` gives samples.

  Of the rows that both have: a run that was forced on may ask for others.
  """
  asked = {old["where"]: old for old in before.get("replies", ())}
  return [
    {
      "group": f"held-out row {new['where']}",
      "prompt": new["prompt"],
      "before": {"text": old["reply"], "stopped": old["stopped"]},
      "after": {"text": new["reply"], "stopped": new["stopped"]},
    }
    for new in after.get("replies", ())
    if (old := asked.get(new["where"]))
  ]
