"""What processes that learn import, imported once in the process that they are forked from."""

from __future__ import annotations

import importlib

from expert_merging.catalogue import all_methods
from expert_merging.libraries import import_transformers

for module in ("torch.distributed.fsdp", "torch.distributed.tensor", "expert_merging.job", "tests.learned.watched"):
    importlib.import_module(module)
for module in ("cma", "expert_merging.running.accelerator", "tests.faults.runs"):
    importlib.import_module(module)
for name in ("MistralForCausalLM", "PreTrainedTokenizerFast", "AutoTokenizer", "AutoModelForCausalLM"):
    getattr(import_transformers(), name)
all_methods()
