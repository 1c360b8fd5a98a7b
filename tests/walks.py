"""Random walks: a model, operations on it, and after each what it gives beside what stock gives.

A step is right if the vectors equal stock's within rounding, or stock ran, was counted and gave the
same bits, or both raised, or an error of this package was raised. All else is silently wrong.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
from torch import nn

from checks import assert_same_vectors
from families import FAMILIES, make_sentence_transformer, make_texts, randomize
from packed_kinds import (
    KINDS,
    Call,
    Kind,
    in_double,
    launches,
    nudged,
    undisturbed,
    written_by_stock,
)
from sbert_fast import FastEncoder
from sbert_fast.errors import SbertFastError

LENGTH = 20
WIDTH = 32
STEPS = 20
# A special token in the text, padding of every amount, and more than `LENGTH` tokens.
TEXTS = [
    "The sea, the [SEP] and THE ship of a seaside 日 bank",
    "riverside",
    "an old road by the water where young people walk in the rain of the night and look for stones",
]
# More of them, and models nearby, where the error of stock itself has to be known: a text whose
# vector depends much on rounding has a small error in some of them by chance.
PEER_TEXTS = [*TEXTS, *make_texts(21, max_words=12)]
NEARBY = 8
PROMPTS = {"query": "find the ", "document": "of "}

# What makes up for an operation; it draws what the operation drew.
Undo = Callable[["Subject"], Any]


class NotNow(Exception):
    """An operation that means nothing for the model as it is."""


# BERT three times as often as any other.
WALKED = ("bert", "bert", *filter(None, (family.walk for family in FAMILIES.values())))


@functools.cache
def _template(family: str) -> SentenceTransformer:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = make_sentence_transformer(family, overrides=sizes | {"intermediate_size": 48})
    dense = Dense(WIDTH, 24, use_residual=True) if family == "roberta" else Dense(WIDTH, WIDTH)
    modules = [made[0], Pooling(WIDTH, "mean"), randomize(dense), Normalize()]
    model = SentenceTransformer(modules=modules, device="cpu", prompts=PROMPTS)
    model.max_seq_length = LENGTH
    return model.eval()


@dataclass
class Subject:
    """A model in the hands of somebody.

    Attributes:
        kind: how it runs packed.
        model: FastEncoder, or a SentenceTransformer that is accelerated.
        rng: of the operation under way.
        undos: of operations that can be undone: their seed and how, the latest last.
        contexts: what is entered around every call, by name.
        how: how the next calls of ours are made; None is the plain way.
        globals: puts back what belongs to no model.
    """

    kind: Kind
    model: Any
    rng: random.Random = field(default_factory=random.Random)
    undos: list[tuple[int, Undo]] = field(default_factory=list)
    contexts: dict[str, Callable[[], AbstractContextManager[Any]]] = field(default_factory=dict)
    how: Callable[[Callable[[], Any]], list[Any]] | None = None
    globals: ExitStack = field(default_factory=ExitStack)

    @classmethod
    def new(cls, kind: str, family: str) -> Subject:
        return cls(KINDS[kind], KINDS[kind].wrap(copy.deepcopy(_template(family))))

    @property
    def first(self) -> Any:
        return self.model[0]

    @property
    def base(self) -> Any:
        return self.model[0].auto_model

    @property
    def tokenizer(self) -> Any:
        return self.model.tokenizer

    @property
    def backend(self) -> Any:
        return self.tokenizer.backend_tokenizer

    def _stack(self) -> tuple[Any, str]:
        """What holds the list of layers, and under which name."""
        if hasattr(self.base, "layers"):
            return self.base, "layers"
        stack = self.base.transformer if hasattr(self.base, "transformer") else self.base.encoder
        return stack, "layer"

    @property
    def layers(self) -> Any:
        return getattr(*self._stack())

    @layers.setter
    def layers(self, layers: nn.ModuleList) -> None:
        setattr(*self._stack(), layers)

    def layer(self) -> Any:
        return self.rng.choice(list(self.layers))

    def attention(self) -> Any:
        layer = self.layer()
        name = next(n for n in ("attn", "self_attn", "attention") if hasattr(layer, n))
        attention = getattr(layer, name)
        return getattr(attention, "self", attention)

    def module(self, *types: type[nn.Module]) -> Any:
        """A module of one of the types that the vectors depend on."""
        found = [
            module
            for name, module in self.model.named_modules()
            if type(module) in types and "pooler" not in name
        ]
        if not found:
            raise NotNow
        return self.rng.choice(found)

    def part(self, name: str) -> Any:
        """The last module of sentence-transformers of that name."""
        found = [module for module in self.model if type(module).__name__ == name]
        if not found:
            raise NotNow
        return found[-1]

    def weight(self) -> nn.Parameter:
        """A matrix or vector of a linear layer."""
        return self.module(nn.Linear).weight

    def act(self, operation: Callable[[Subject], Undo | None], seed: int) -> None:
        self.rng = random.Random(seed)
        undo = operation(self)
        if undo is not None:
            self.undos.append((seed, undo))

    def undo(self) -> None:
        """Undo the latest of what can be undone."""
        if not self.undos:
            raise NotNow
        seed, undo = self.undos.pop()
        self.rng = random.Random(seed)
        undo(self)

    def close(self) -> None:
        self.globals.close()

    # Comparison

    def attempt(self, call: Call, model: Any, texts: list[str]) -> Any:
        """What a call gives: an array, or the error it raised."""
        torch.default_generator.manual_seed(0)
        try:
            with ExitStack() as stack:
                for context in self.contexts.values():
                    stack.enter_context(context())
                return call(model, texts)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            return error

    def stock(self, call: Call, texts: list[str] = TEXTS) -> Any:
        """What stock gives; whatever it writes to the model or the tokenizer is put back."""
        with self.kind.stock(self.model) as model, undisturbed(self.model):
            return self.attempt(call, model, texts)

    def fault(self, name: str) -> str | None:
        """What is silently wrong with a call now; None where nothing is."""
        call, model = self.kind.calls[name], self.model
        launched, counted = launches(), self.kind.counted(model)
        how, self.how = self.how, None
        written = [(tensor, tensor.clone()) for tensor in written_by_stock(model)]
        once = functools.partial(self.attempt, call, model, TEXTS)
        found = [once()] if how is None else how(once)
        ran_packed = launches() > launched
        was_counted = self.kind.counted(model) > counted
        for tensor, before in written:
            if not torch.equal(tensor, before):
                tensor.data.copy_(before)
        expected = self.stock(call)
        for ours in found:
            if isinstance(ours, BaseException):
                problem = _wrong_error(ours, expected)
            elif isinstance(expected, BaseException):
                problem = self._beyond_stock(call, ours, expected)
            elif ours.shape != expected.shape:
                problem = f"shape {ours.shape}, stock gives {expected.shape}"
            elif ran_packed or how is not None:
                problem = self._difference(call, ours, expected)
            elif not was_counted and isinstance(model, FastEncoder) and not self.contexts:
                problem = "ran in stock, uncounted"
            else:
                same = np.array_equal(ours, expected, equal_nan=True)
                problem = None if same else f"counted, yet off by {np.abs(ours - expected).max()}"
            if problem is not None:
                return f"{name}, {'packed' if ran_packed else 'not packed'}: {problem}"
        return None

    def _beyond_stock(self, call: Call, ours: np.ndarray, error: BaseException) -> str | None:
        """Stock may mix dtypes under autocast that torch refuses; `encode` keeps its own there."""
        kept = self.contexts
        self.contexts = {name: make for name, make in kept.items() if name != "autocast"}
        try:
            plain = self.stock(call)
            if not isinstance(self.model, FastEncoder) or isinstance(plain, BaseException):
                return f"stock raises {error!r}"
            return self._difference(call, ours, plain)
        finally:
            self.contexts = kept

    def _difference(self, call: Call, ours: np.ndarray, expected: np.ndarray) -> str | None:
        """Within the fp32 budget, or within twice the error of stock itself against fp64."""
        # In float64, torch gives NaN for a row whose keys are all masked: a column of padding whose
        # window holds nothing but padding. Pooling multiplies it by 0.
        finite = np.isfinite(expected).all(axis=-1)
        with contextlib.suppress(AssertionError):
            assert_same_vectors(ours[finite], expected[finite])
            return None
        exact = in_double(call)
        here = self.stock(exact)
        if isinstance(here, BaseException):
            return f"differs, and what it is to be compared with raises {here!r}"
        error, bound = np.abs(ours - here).max(), 0.0
        pairs = [(call, exact), *((nudged(call, n), nudged(exact, n)) for n in range(NEARBY))]
        for pair in pairs:
            peer, oracle = (self.stock(each, PEER_TEXTS) for each in pair)
            for result in (peer, oracle):
                if isinstance(result, BaseException):
                    return f"differs, and what it is to be compared with raises {result!r}"
            eps = max(torch.finfo(p.dtype).eps for p in self.model.parameters())
            bound = max(bound, 2 * (np.abs(peer - oracle).max() + eps * np.abs(oracle).max()))
            if error <= bound:
                return None
        return f"off by {error:.2e}, bound {bound:.2e}"


def _wrong_error(ours: BaseException, expected: Any) -> str | None:
    documented = isinstance(ours, SbertFastError) or (
        isinstance(ours, ValueError) and str(ours).startswith("max_seq_length must be")
    )
    if documented or isinstance(expected, BaseException):
        return None
    return f"raises {ours!r}, stock does not"
