"""A run: a config comes in, a trained, measured and exported model goes out.

Reading order: `config` (every key; `config_check` refuses wrong values),
`run` (the phases), `build/` (data, model and step of a config),
`loop` (the steps), `step_runner` (one step), `recorder` (what is written
down). Beside them `session` (what phases share), `interrupts` (signals, hangs),
`selfcheck` (laws tested on the devices), `start_page`, and `planning/` (memory
and time, without running).
"""
