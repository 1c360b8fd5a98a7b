"""A call of `encode`: what it asks for, and its results in the form it asks for."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sbert_fast.arguments import OUTPUT_VALUES, check_device, check_positive
from sbert_fast.tokenization import check_texts
from sbert_fast.values import Precision, shown


@dataclass(frozen=True, slots=True)
class Call:
    """What `encode` was asked for: its arguments, by name.

    Attributes:
        keywords: further arguments, which only sentence-transformers reads.
        in_workers: whether other processes compute it.
    """

    prompt: str | None
    batch_size: int
    show_progress_bar: bool | None
    output_value: str | None
    normalize_embeddings: bool
    truncate_dim: int | None
    precision: Precision | None = "float32"
    convert_to_numpy: bool = True
    convert_to_tensor: bool = False
    device: str | torch.device | list[str | torch.device] | None = None
    pool: dict[Any, Any] | None = None
    chunk_size: int | None = None
    keywords: dict[str, Any] = field(default_factory=dict)
    in_workers: bool = False

    @classmethod
    def of_inference(cls, *, save_to_cpu: bool = True, **arguments: Any) -> Call:
        """The call, or part of one, that sentence-transformers hands to `_inference`."""
        known = {name: arguments.pop(name) for name in _NAMES & arguments.keys()}
        return cls(**known, convert_to_numpy=save_to_cpu, keywords=arguments)

    def arguments(self) -> dict[str, Any]:
        """The arguments that ask for this call."""
        return {name: getattr(self, name) for name in _NAMES} | self.keywords

    def check(self) -> None:
        """Refuse arguments that no model takes.

        Raises:
            ValueError: names the argument.
        """
        if self.output_value not in OUTPUT_VALUES:
            raise ValueError(
                f"output_value must be one of {OUTPUT_VALUES}, got {shown(self.output_value)}"
            )
        if self.truncate_dim is not None:
            check_positive("truncate_dim", self.truncate_dim)
        if isinstance(self.device, list) and not self.device:
            raise ValueError("device must be a device or a list of devices, got an empty list")
        for device in self.device if isinstance(self.device, list) else [self.device]:
            if device is not None:
                check_device("device", device)
        if self.in_workers and self.chunk_size is not None:
            check_positive("chunk_size", self.chunk_size)
        if self.prompt is not None:
            check_texts([self.prompt], "prompt")

    @property
    def moves_to(self) -> str | torch.device | None:
        """The device on which this process is to compute; None for where the model is."""
        return None if self.in_workers or isinstance(self.device, list) else self.device

    @property
    def is_of_sentences(self) -> bool:
        return self.output_value == "sentence_embedding"

    @property
    def is_quantized(self) -> bool:
        return self.precision not in (None, "float32")

    @property
    def on_host(self) -> bool:
        """Whether embeddings leave the device of the model."""
        return self.is_quantized or (self.convert_to_numpy and not self.convert_to_tensor)

    def unquantized(self) -> Call:
        """The same call in float32: an array if it asks for one, otherwise a tensor."""
        as_tensor = self.convert_to_tensor or not self.convert_to_numpy
        return replace(self, precision="float32", convert_to_tensor=as_tensor)

    def convert(self, embeddings: Tensor) -> Any:
        """Convert fp32 `[N, dimension]` to the type that was asked for."""
        if not len(embeddings):
            empty = torch.tensor([], device=embeddings.device)
            if self.convert_to_tensor:
                return empty
            return np.array([]) if self.convert_to_numpy else []
        result: Any = embeddings
        if self.is_quantized:
            # Imported here, so that accelerating a plain transformers model does not need it.
            from sentence_transformers.util import quantize_embeddings

            result = quantize_embeddings(embeddings, precision=self.precision)
        if self.convert_to_tensor:
            return torch.as_tensor(result)
        if self.convert_to_numpy:
            return result if isinstance(result, np.ndarray) else result.cpu().numpy()
        return list(torch.as_tensor(result))

    def convert_rows(self, embeddings: Any) -> Any:
        """:meth:`convert` for an array or tensor, of a single input `[dimension]`."""
        rows = torch.as_tensor(embeddings)
        single = rows.ndim == 1 and len(rows) > 0
        result = self.convert(rows[None] if single else rows)
        return result[0] if single else result


# Arguments that `encode` of sentence-transformers has under the same names.
_NAMES = {each.name for each in fields(Call)} - {"keywords", "in_workers"}
