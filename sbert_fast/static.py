"""Static embeddings: the mean of rows of a table, as `StaticEmbedding` and model2vec have it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import tokenizers
from torch import nn

from sbert_fast import models
from sbert_fast.admission import Admission
from sbert_fast.engine import PackedEncoder, Prepared
from sbert_fast.errors import UnsupportedModelError
from sbert_fast.layers import PoolKernels, Stack
from sbert_fast.models.base import Embeddings, EncoderWeights
from sbert_fast.models.checks import check_parameters
from sbert_fast.preparation import embedding_op, prepare_table
from sbert_fast.tokenization import TextTokenizer, tokenize

# What an EmbeddingBag may be told. Its other options change gradients alone.
_OPTIONS = {"mode": "mean", "max_norm": None, "padding_idx": None, "include_last_offset": False}
# Tokens of a text that is not cut.
_NO_LIMIT = 2**31 - 1


def _read(table: nn.Module) -> tuple[models.Architecture, EncoderWeights]:
    """Sizes and the live parameter of the EmbeddingBag in a StaticEmbedding: a model without
    layers.

    Raises:
        UnsupportedModelError: with the reason.
    """
    if (reason := models.originals_of(table).reason) is not None:
        raise UnsupportedModelError(reason)
    if type(table) is not nn.EmbeddingBag:
        raise UnsupportedModelError(
            f"expected torch.nn.EmbeddingBag, got {type(table).__module__}."
            f"{type(table).__qualname__}"
        )
    for name, expected in _OPTIONS.items():
        if (found := vars(table).get(name, "nothing")) != expected:
            raise UnsupportedModelError(f"EmbeddingBag.{name} must be {expected!r}, got {found!r}")
    weight = table._parameters.get("weight")
    if weight is None or weight.dim() != 2 or not weight.numel():
        raise UnsupportedModelError("EmbeddingBag.weight must be a parameter [V, E]")
    weights = EncoderWeights(Embeddings(weight, None, None, None), ())
    check_parameters(table, weights)
    rows, width = weight.shape
    architecture = models.Architecture(
        family="StaticEmbedding",
        embedding_size=width,
        hidden_size=width,
        num_heads=0,
        head_dim=0,
        num_layers=0,
        intermediate_size=0,
        vocab_size=rows,
        position_offset=0,
        uncounted_id=None,
        max_tokens=_NO_LIMIT,
        type_vocab_size=0,
    )
    return architecture, weights


class StaticEncoder(PackedEncoder):
    """The packed pass of an EmbeddingBag up to its mean: a row of the table for every token.

    Arguments and errors are those of :class:`PackedEncoder`; `model` is the EmbeddingBag.
    """

    prefix = "embedding."

    def _admit(self) -> Admission:
        return Admission(self.model, _read)

    def required_ops(self) -> list[tuple[str, dict[str, Any]]]:
        embeddings = self.admitted.weights.embeddings
        return [
            embedding_op(embeddings),
            ("segment_pool_out", {"width": embeddings.word.shape[1]}),
        ]

    def _lay_out(self, weights: EncoderWeights) -> Prepared:
        embed = self.bind("embed_norm")
        target = self._target()
        return Prepared(
            architecture=self.architecture,
            target=target,
            word=prepare_table(weights.embeddings.word, target, embed),
            position=None,
            token_type=None,
            embedding_norm=None,
            projection=None,
            scale=None,
            stack=Stack((), None, None, ()),
            embed=embed,
            pooling=PoolKernels(self.bind("segment_pool_out"), None),
            row_alignment=1,
        )


class StaticTokenizer(TextTokenizer):
    """The tokenizer of a StaticEmbedding, which is used as it is, but without special tokens.

    Args:
        tokenizer: one of the package `tokenizers`, unless :meth:`refresh` refuses it.
    """

    def __init__(self, tokenizer: Any) -> None:  # noqa: ANN401
        self.max_length, self.returns_types = _NO_LIMIT, False
        self._backend = self._tokenizer = tokenizer

    def refresh(self) -> None:
        """Look at the tokenizer as it is now.

        Raises:
            UnsupportedModelError: it is of another class, it pads, or a method was replaced.
        """
        tokenizer = self._tokenizer
        if type(tokenizer) is not tokenizers.Tokenizer:
            raise UnsupportedModelError(
                f"the tokenizer must be tokenizers.Tokenizer, got {type(tokenizer).__module__}."
                f"{type(tokenizer).__qualname__}"
            )
        if vars(tokenizer):
            raise UnsupportedModelError(f"the tokenizer has its own {', '.join(vars(tokenizer))}")
        if tokenizer.padding is not None:
            raise UnsupportedModelError("the tokenizer pads: padding is part of the mean")
        truncation = tokenizer.truncation
        self.max_length = _NO_LIMIT if truncation is None else max(1, truncation["max_length"])

    def _encode(self, texts: Sequence[str]) -> list[Any]:
        encode = partial(self._backend.encode_batch_fast, add_special_tokens=False)
        return tokenize(encode, texts)
