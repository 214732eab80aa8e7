"""Train an IEC-LoRA adapter with transformers' Trainer.

python train_with_trainer.py ARTIFACT TEXT_FILE ADAPTER [STEPS]
"""

import sys
from pathlib import Path

from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import irq_convert

artifact, text_file, out, *rest = sys.argv[1:]
length = 128

tokenizer = AutoTokenizer.from_pretrained(artifact)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
ids = tokenizer(Path(text_file).read_text(encoding="utf-8"), verbose=False)["input_ids"]
windows = [{"input_ids": ids[at : at + length]} for at in range(0, len(ids) - 1, length)]

model = irq_convert.load(artifact)
config = irq_convert.IecLoraConfig(r=64, lora_alpha=16, lora_dropout=0.1, task_type="CAUSAL_LM")
model = irq_convert.attach(model, config, gradient_checkpointing=True)
model.print_trainable_parameters()

arguments = TrainingArguments(
    output_dir=f"{out}-checkpoints",
    max_steps=int(rest[0]) if rest else 100,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=4,
    learning_rate=2e-4,
    lr_scheduler_type="constant",
    max_grad_norm=0.3,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
)
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
Trainer(model=model, args=arguments, train_dataset=windows, data_collator=collator).train()
model.save_pretrained(out)
