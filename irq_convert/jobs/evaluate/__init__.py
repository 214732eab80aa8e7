"""Evaluation: perplexity of a model on a text, its distance from another model, scores on tasks.

`options` says what to measure on a text, `windows` drives one model or two, `report` is what came
out and `evaluate` is all of it from names of files. `task_options`, `harness` and `harness_model`
(lm-eval), `task_report` and `tasks` are the same for tasks. Text, metrics, loading and adapters lie
below: `jobs/common`, `hf/causal_lm` and `adapters/put_on`.
"""
