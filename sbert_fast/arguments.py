"""The arguments of `encode`: checks, and what kind of input each is."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sbert_fast.errors import InputError, NoSuchDeviceError
from sbert_fast.values import DTYPES, shown

OUTPUT_VALUES = ("sentence_embedding", "token_embeddings", None)
_DTYPES = {name: getattr(torch, name, None) for name in DTYPES}


class DefaultBatchSize(int):
    """The default of `batch_size`: it reads 32 but limits nothing, unlike an explicit 32."""


DEFAULT_BATCH_SIZE = DefaultBatchSize(32)


def with_default_batch_size(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method` of sentence-transformers with a default of `batch_size` that limits nothing."""
    position = list(inspect.signature(method).parameters).index("batch_size")

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if len(args) <= position:
            kwargs.setdefault("batch_size", DEFAULT_BATCH_SIZE)
        return method(*args, **kwargs)

    return call


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The dtype that an argument names; None if it leaves the dtype to the model.

    Raises:
        ValueError: it names no dtype that the engine computes in.
    """
    if isinstance(dtype, torch.dtype) and dtype in _DTYPES.values():
        return dtype
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        expected = ", ".join(map(repr, _DTYPES))
        raise ValueError(f"dtype must be one of {expected} or the torch dtype, got {shown(dtype)}")
    return _DTYPES[dtype]


def check_positive(name: str, value: object, alternative: str | None = None) -> None:
    if value == alternative and alternative is not None:
        return
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
        wanted = "a positive integer" + (f" or {alternative!r}" if alternative else "")
        raise ValueError(f"{name} must be {wanted}, got {shown(value)}")


def check_device(name: str, device: str | torch.device | int) -> None:
    """Refuse anything that is not a device of this machine.

    Raises:
        NoSuchDeviceError: names the argument `name` and the devices there are.
    """
    try:
        wanted = torch.device(device)
        # Counting GPUs starts no GPU.
        if wanted.type != "cuda" or not torch.cuda.is_available():
            torch.empty(0, device=wanted)
        elif (wanted.index or 0) >= torch.cuda.device_count():
            raise RuntimeError("there are fewer GPUs")
    except (RuntimeError, AssertionError, TypeError) as error:
        devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise NoSuchDeviceError(
            f"{name} must be one that this machine has ({', '.join(devices)}), got {device!r}: "
            f"{str(error).splitlines()[0]}"
        ) from error


def check_keywords(given: Iterable[str], of_model: Callable[[], Iterable[str]]) -> None:
    """Refuse keyword arguments of `encode` that nothing reads, as sentence-transformers does."""
    if not given:
        return
    known = ["task", "processing_kwargs", *of_model()]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(
            f"keyword arguments must be among {', '.join(known)}, got {', '.join(unknown)}"
        )


class Chunk(list[Any]):
    """Inputs for worker processes; each of its slices knows where it begins.

    Attributes:
        offset: position of the first of them in the caller's input.
        checks: whether the worker refuses embeddings that are not finite. If the caller's process
            does so instead, it can name the texts, and no error has to reach it from a worker:
            errors in the workers of sentence-transformers 6.0 and 6.1 never do.
    """

    def __init__(self, inputs: Iterable[Any], offset: int = 0, *, checks: bool = True) -> None:
        super().__init__(inputs)
        self.offset = offset
        self.checks = checks

    def __getitem__(self, key: Any) -> Any:
        part = super().__getitem__(key)
        if not isinstance(key, slice):
            return part
        return Chunk(part, self.offset + key.indices(len(self))[0], checks=self.checks)


# Iterable, but each is a single input, or has no order.
_NOT_TEXTS = (bytes, bytearray, Mapping, Tensor, set, frozenset)


def either(inputs: Any, sentences: Any) -> Any:
    """The inputs of a call, which may be given under their former name."""
    if inputs is not None and sentences is not None:
        raise TypeError("encode takes inputs or sentences, its former name, but got both")
    return sentences if inputs is None else inputs


def as_list(inputs: object) -> list[Any]:
    """The elements of anything iterable that is not itself a single input."""
    if isinstance(inputs, list):
        return inputs
    if isinstance(inputs, np.ndarray):
        listed = inputs.tolist()
        if isinstance(listed, list):
            return listed
    elif getattr(inputs, "ndim", 1) != 1 or hasattr(inputs, "column_names"):
        raise InputError(
            f"inputs must have one dimension, got {type(inputs).__name__}: "
            "take one column of a table"
        )
    elif hasattr(inputs, "to_pylist"):
        # Elements of pyarrow's arrays are not str.
        return list(inputs.to_pylist())
    elif isinstance(inputs, Iterable) and not isinstance(inputs, _NOT_TEXTS):
        return list(inputs)
    raise InputError(f"inputs must be a str or an iterable of str, got {type(inputs).__name__}")
