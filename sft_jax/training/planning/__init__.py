"""Memory, time and traffic of a run, before it starts.

In: the run as shapes (`training.build.abstract`) and a machine, here or
elsewhere. Out: a `Plan`, and what to change where it does not fit. Reading
order: `plan`, `cost_model`, `step_time` (of a TPU), `suggest` (a learning rate,
by short trials).
"""
