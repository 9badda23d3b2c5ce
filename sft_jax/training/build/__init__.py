"""From a config to what a run works with: data, model, step, evaluation.

In comes the config; out comes a `BuiltRun`. Only `training` and `commands` read
config keys: everything below takes plain arguments.

Reading order: `build`, `data` (with `sources`), `model`, `step`, `state`,
`evals` (run by `measuring`), `outputs` (what is written). `abstract` builds the
same step without arrays, `host_consistency` compares processes, `load_run`
loads a model from a run, a checkpoint or an export.
"""
