"""Tiny random rerankers that generate."""

from __future__ import annotations

import tempfile
from typing import Any

from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore

from families import FAMILIES, make_tokenizer, save_model

# The families that generate, whose classifiers read the last token.
NAMES = [name for name in ("gemma3_text", "qwen3") if name in FAMILIES]
# How a chat template may lay out a pair; what comes last is there only if a model asks for it.
CHAT_TEMPLATE = (
    "[CLS]{% for m in messages %}the {{ m.role }}: {{ m.content }} [SEP]{% endfor %}"
    "{% if add_generation_prompt %}[CLS] is it good?{% endif %}"
)
PROCESSING = {"chat_template": {"add_generation_prompt": True}}


def make_reranker(
    name: str = "qwen3",
    *,
    template: str | None = CHAT_TEMPLATE,
    tokens: tuple[int, int | None] = (57, 83),
    processing: dict[str, Any] | None = None,
    **overrides: Any,
) -> CrossEncoder:
    """A random CrossEncoder that generates, on the CPU.

    Args:
        name: a key of `families.VARIANTS`.
        template: formats the pairs; None leaves that to the tokenizer.
        tokens: those of yes and no.
        processing: `processing_kwargs` of its first module.
        **overrides: config fields, see :func:`families.make_config`.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_model(name, folder, head="AutoModelForCausalLM", **overrides)
        tokenizer = make_tokenizer(name)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        how = {"transformer_task": "text-generation", "processing_kwargs": processing}
        modules = [Transformer(folder, **how), LogitScore(*tokens)]
    return CrossEncoder(modules=modules, device="cpu").eval()
