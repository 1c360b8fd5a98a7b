"""Adapters of peft: attached, merged, taken off."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from model_operations import Act, operation
from walks import Subject, Undo


def _lora(**options: Any) -> Any:
    torch.manual_seed(0)
    targets = ["query", "value", "q_lin", "v_lin", "dense"]
    return LoraConfig(target_modules=targets, init_lora_weights=False, lora_alpha=32, **options)


def _merged(**how: Any) -> Act:
    def act(s: Subject) -> None:
        get_peft_model(s.base, _lora()).merge_and_unload(**how)

    return act


operation(_merged(), name="LoRA merged")
operation(_merged(safe_merge=True), name="LoRA merged safely")


@operation(weight=0.5)
def adapter_attached(s: Subject) -> Undo:
    s.model.add_adapter(_lora())
    return lambda s: s.model.delete_adapter("default")


@operation(weight=0.5)
def peft_model_put_in_place(s: Subject) -> Undo:
    s.first.model = get_peft_model(s.base, _lora())
    return lambda s: setattr(s.first, "model", s.base.unload())


@operation
def adapter_on_the_table_merged(s: Subject) -> None:
    torch.manual_seed(1)
    config = LoraConfig(target_modules=["word_embeddings"], init_lora_weights=False)
    get_peft_model(s.base, config).merge_and_unload()


@operation(weight=0.5, changes=False)
def adapter_switched_off(s: Subject) -> Undo:
    s.model.add_adapter(_lora(), adapter_name="other")
    s.model.disable_adapters()
    return lambda s: s.model.delete_adapter("other")


@operation
def adapter_merged_in_place(s: Subject) -> None:
    adapted = get_peft_model(s.base, _lora())
    adapted.merge_adapter()
    adapted.unload()
