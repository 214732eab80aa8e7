"""Run by test_plain.py in a process of its own: stock PEFT on dense models, without our package.

Each line of input names a dense model, an adapter folder and a file to write the logits of both
together to; the last line of output says which modules of ours were imported.
"""

from __future__ import annotations

import json
import sys
import warnings

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

warnings.simplefilter("ignore")
for line in sys.stdin:
    case = json.loads(line)
    model = AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32)
    if case["adapter"] is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # PEFT only warns of keys that are missing
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=FutureWarning)
            model = PeftModel.from_pretrained(model, case["adapter"])
    ids = torch.tensor(case["ids"])
    with torch.no_grad():
        torch.save(model.eval()(ids).logits, case["out"])
print(json.dumps([name for name in sys.modules if name.startswith("irq_convert")]))
