"""PackedCollator: batches of training without padding."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch import Tensor

from sbert_fast.padded_call import CU_SEQLENS
from sbert_fast.sentence_transformers.encoder import FastEncoder


class PackedCollator(SentenceTransformerDataCollator):
    """A data collator for `SentenceTransformerTrainer` that pads nothing.

    Each column becomes `input_ids` `[T]`, one text after the other, and `cu_seq_lens_q` `[B + 1]`,
    where they begin; states `[1, T, E]` go to the pooling of sentence-transformers. Results are
    those of the trainer's own collator, whose batches are padded first and packed later.

    Only a :class:`FastEncoder` reads such batches: another model that a loss hands them to, as the
    guide of `GISTEmbedLoss`, must be one, too, with the same tokenizer, or raises an error. An
    `IterableDataset` needs `accelerator_config={"dispatch_batches": False}`: accelerate would cut
    all tensors of a batch to one length.

    Args:
        model: the one that is trained.
        **kwargs: further arguments of `SentenceTransformerDataCollator`, such as `prompts`, which
            the trainer gives to none but its own.

    Raises:
        TypeError: `model` is not a `FastEncoder`.
        ValueError: it does not run packed, or does not begin with a Transformer; the message says
            why.

    Example:
        >>> trainer = SentenceTransformerTrainer(
        ...     encoder, train_dataset=pairs, loss=loss, data_collator=PackedCollator(encoder)
        ... )
    """

    def __init__(self, model: FastEncoder, **kwargs: Any) -> None:
        if not isinstance(model, FastEncoder):
            raise TypeError(f"model must be a FastEncoder, got {type(model).__name__}")
        reason = model._own_method() or model.unsupported_reason
        if reason is None and type(model[0]) is not Transformer:
            reason = f"its first module is a {type(model[0]).__name__}"
        if reason is not None:
            raise ValueError(f"model must run packed: {reason}")
        super().__init__(preprocess_fn=_Preprocess(model), **kwargs)


class _Preprocess:
    """`model.preprocess`, but without padding."""

    def __init__(self, model: FastEncoder) -> None:
        self.model = model

    def __call__(self, inputs: Sequence[Any], **kwargs: Any) -> dict[str, Any]:
        # sentence-transformers flattens batches for flash attention. A copy, with the same model
        # and tokenizer, is told to do so: the module itself serves `encode`, too.
        module: Any = copy.copy(self.model[0])
        module.can_flatten_inputs, module.data_collator = True, _flatten
        module._flatten_position_offset = 0
        return dict(module.preprocess(inputs, **kwargs))


def _flatten(samples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Samples, each of lists of integers, one after the other."""
    lengths = torch.tensor([0, *(len(sample["input_ids"]) for sample in samples)])
    columns = {
        name: torch.tensor([each for sample in samples for each in sample[name]])
        for name in ("input_ids", "token_type_ids")
        if name in samples[0]
    }
    return columns | {CU_SEQLENS: lengths.cumsum(0).to(torch.int32)}
