"""The recipe in the words of transformers' Trainer."""

from __future__ import annotations

import torch
from transformers import TrainingArguments

from irq_convert.jobs.finetune.options import Optimizer, Schedule
from irq_convert.jobs.finetune.recipe import Recipe

OPTIMIZERS = {Optimizer.ADAMW: "adamw_torch", Optimizer.PAGED_ADAMW: "paged_adamw_32bit"}
_SCHEDULERS = {
    (Schedule.CONSTANT, False): "constant",
    (Schedule.CONSTANT, True): "constant_with_warmup",
    (Schedule.COSINE, False): "cosine",
    (Schedule.COSINE, True): "cosine",
}


def training_arguments(recipe: Recipe, writing: str, measured: bool) -> TrainingArguments:
    """The recipe as Trainer takes it; checkpoints go to the folder `writing`."""
    cpu = recipe.device == "cpu"
    if not cpu:
        torch.cuda.set_device(torch.device(recipe.device))
    arguments = TrainingArguments(
        output_dir=writing,
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.micro_batch,
        gradient_accumulation_steps=recipe.accumulation,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=_SCHEDULERS[Schedule(recipe.schedule), recipe.warmup > 0],
        warmup_steps=recipe.warmup,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        optim=OPTIMIZERS[Optimizer(recipe.optimizer)],
        seed=recipe.seed,
        data_seed=recipe.seed,
        bf16=recipe.dtype == "bfloat16",
        use_cpu=cpu,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would hide what the guard looks for
        eval_strategy="steps" if measured else "no",
        eval_steps=recipe.eval_every if measured else None,
        save_strategy="steps",
        save_steps=recipe.save_every,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=not cpu,
        ddp_backend=("gloo" if cpu else "nccl") if recipe.processes > 1 else None,
        ddp_find_unused_parameters=False if recipe.processes > 1 else None,
    )
    if recipe.processes == 1 and not cpu:
        arguments._n_gpu = 1  # with several GPUs Trainer would copy the model to each of them
        # Its own set-up, which has run by now, takes the first GPU whatever the recipe says.
        device = torch.device(recipe.device)
        arguments.__dict__["_setup_devices"] = device
        torch.cuda.set_device(device)
    return arguments
