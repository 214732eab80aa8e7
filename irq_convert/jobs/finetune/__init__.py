"""Finetuning: train a LoRA, IEC-LoRA or block-pooled adapter on an artifact.

`options` says what is asked and `recipe` what will be done; `rows`, `prompts`, `encode` and `data`
turn a file into examples; `prepare` knows all of it before weights are loaded. `model` loads the
base and attaches the adapter, `loss` measures it, `trainer` takes the steps and `training_run` is
a run from start to end; `folder` keeps the adapter folder, `report` and `curve` write beside the
adapter what the run was. `finetune` is all of it from names of files, `estimate` its dry run.
"""
