"""Tiny random rerankers that generate, and when sentence-transformers runs a reranker."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore

from families import FAMILIES, make_tokenizer, save_model
from sbert_fast import FastCrossEncoder, explain
from sbert_fast.sentence_transformers.stock import as_stock

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


def assert_runs_in_stock(
    model: FastCrossEncoder, change: Callable[[Any], None], pairs: Any, reason: str = ""
) -> None:
    """After `change`, sentence-transformers runs, or fails in, a call, which is counted."""
    model.predict(pairs)
    change(model)
    try:
        expected = as_stock(model).predict(pairs)
    except Exception as error:
        with pytest.raises(type(error)):
            model.predict(pairs)
    else:
        assert np.array_equal(model.predict(pairs), expected)
    ((found, calls),) = model.stats.fallbacks.items()
    assert calls == 1 and found.startswith(reason) and found in explain(model)
