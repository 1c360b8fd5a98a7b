"""How many tokens a batch holds: what fits a device, and what is learned from running out."""

from __future__ import annotations

import logging

import torch

from sbert_fast.forking import Lock
from sbert_fast.models import Architecture

logger = logging.getLogger("sbert_fast")

# Bytes of the widest activation of a batch, and the most tokens of a batch: fewer cost speed, more
# gain nothing and take memory.
_CPU_ACTIVATION_BYTES = 12 << 20
_CPU_TOKENS = 2048
# Tiles of 128 tokens that each processor of a GPU gets, and the share of its memory that the
# activations of a batch may take.
_TILE = 128
_TILES_PER_PROCESSOR = 4
_MEMORY_SHARE = 1 / 8
_MAX_HALVINGS = 6


def cpu_tokens(architecture: Architecture, dtype: torch.dtype) -> int:
    """Tokens of a batch on a CPU, given the width of the model."""
    width = max(architecture.up_size, 3 * architecture.hidden_size)
    tokens = _CPU_ACTIVATION_BYTES // (width * dtype.itemsize)
    return int(min(_CPU_TOKENS, max(256, tokens // 64 * 64)))


def gpu_tokens(
    architecture: Architecture, dtype: torch.dtype, total_memory: int, processors: int
) -> int:
    """Tokens of a batch on a GPU: the same number of tiles for every processor.

    They depend on the model, the dtype and the device alone, so that results repeat.

    Args:
        architecture: of the model.
        dtype: of the activations.
        total_memory: of the device, in bytes; how much of it is free plays no part.
        processors: multiprocessors of the device.
    """
    # Alive at once: x, qkv and the attended values, or x, the FFN's inner activation and its GELU.
    hidden, inner = architecture.hidden_size, architecture.intermediate_size
    per_token = dtype.itemsize * max(5 * hidden, 2 * hidden + inner + architecture.up_size)
    tiles = int(total_memory * _MEMORY_SHARE) // (per_token * _TILE)
    if tiles >= processors:
        tiles = min(_TILES_PER_PROCESSOR, tiles // processors) * processors
    return max(1, tiles) * _TILE


def default_tokens(architecture: Architecture, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens of a batch on `device`."""
    if device.type != "cuda":
        return cpu_tokens(architecture, dtype)
    properties = torch.cuda.get_device_properties(device)
    return gpu_tokens(
        architecture, dtype, properties.total_memory, properties.multi_processor_count
    )


class MemoryLimit:
    """The largest batch that fits the memory of a device, once a larger one has failed.

    It remembers, so that what failed once is not tried again. Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._tokens: int | None = None
        self._halvings = 0

    def apply(self, tokens: int) -> int:
        """`tokens`, or fewer if that many are known not to fit."""
        limit = self._tokens
        return tokens if limit is None else min(tokens, limit)

    def halve(self, tokens: int) -> int | None:
        """Note that a batch of `tokens` did not fit.

        Returns:
            The tokens to continue with; None after too many halvings.
        """
        with self._lock:
            if self._tokens is not None and self._tokens <= tokens // 2:
                return self._tokens  # another thread got here first
            if self._halvings == _MAX_HALVINGS or tokens < 2:
                return None
            self._halvings += 1
            self._tokens = tokens // 2
        logger.warning(
            "out of memory with %d tokens a batch: continuing with half; "
            "set batch_tokens=%d to avoid this",
            tokens,
            tokens // 2,
        )
        return tokens // 2
