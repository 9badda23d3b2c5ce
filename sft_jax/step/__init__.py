"""The optimizer step, pure: it knows no config, no data and no model.

In: functions (hidden states, head) and a `Batch`. Out: the next `TrainState`
and metrics as (sum, weight) pairs.

Reading order: `train_step` (one step, accumulation, what is skipped), `loss`
(formula, gradient, chunks), `loss_groups` (by token role and source),
`optimizer` (schedules, rounding), `distillation` (a teacher), `preferences`
(pairs of answers).
"""
