"""Train a block-pooled adapter on instructions with TRL's SFTTrainer.

python train_with_sft.py ARTIFACT JSON_FILE ADAPTER [STEPS]

The file is a JSON array of objects with `instruction`, `input` and `output`.
"""

import json
import sys
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

import irq_convert

artifact, json_file, out, *rest = sys.argv[1:]


def split(row: dict[str, str]) -> dict[str, str]:
    """The prompt is read, the completion learned."""
    given = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
    prompt = f"### Instruction:\n{row['instruction']}\n\n{given}### Response:\n"
    return {"prompt": prompt, "completion": row["output"]}


rows = json.loads(Path(json_file).read_text(encoding="utf-8"))
model = irq_convert.load(artifact)
config = irq_convert.IecLoraConfig(r=64, lora_alpha=16, pool="block", task_type="CAUSAL_LM")
model = irq_convert.attach(model, config)

arguments = SFTConfig(
    output_dir=f"{out}-checkpoints",
    max_steps=int(rest[0]) if rest else 100,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=4,
    learning_rate=2e-4,
    lr_scheduler_type="constant",
    max_length=256,
    bf16=False,  # True on a GPU
    gradient_checkpointing=False,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
)
SFTTrainer(
    model=model,
    args=arguments,
    train_dataset=Dataset.from_list([split(row) for row in rows]),
    processing_class=AutoTokenizer.from_pretrained(artifact),
).train()
model.save_pretrained(out)
