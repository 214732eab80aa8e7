"""Finetuning: train a LoRA, IEC-LoRA or block-pooled adapter on an artifact.

`options` says what is asked and `recipe` what will be done; `rows`, `prompts`, `encode` and `data`
turn a file into examples; `model` loads the base and attaches the adapter, `loss` measures it,
`trainer` takes the steps and `run` is a run from start to end; `folder` keeps the adapter folder,
`record` and `curve` write beside the adapter what the run was; `job` is all of it from names of
files, `estimate` its dry run.
"""
