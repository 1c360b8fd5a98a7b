"""sentence-transformers on packed batches, where flash-attn is not installed.

sentence-transformers runs its models without padding when flash-attn computes attention. Here
torch's own kernel for packed sequences, the same algorithm, takes that place: it is registered with
transformers under a name of its own, and the module is told that it may pack.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "packed_varlen"


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: q, k and v `[1, H, T, D]` -> `[1, T, H, D]`."""
    assert cu_seq_lens_q is not None and attention_mask is None, "the batch is not packed"
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    if q.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        cu = cu_seq_lens_q
        return varlen_attn(q, k, v, cu, cu, max_length_q, max_length_q, scale=scaling)[None], None
    # There is no such kernel on a CPU; this one is for checks.
    out, bounds = torch.empty_like(q), cu_seq_lens_q.tolist()
    for start, end in zip(bounds, bounds[1:], strict=False):
        parts = (t[start:end].transpose(0, 1) for t in (q, k, v))
        out[start:end] = F.scaled_dot_product_attention(*parts, scale=scaling).transpose(0, 1)
    return out[None], None


def load(path: str, device: str, dtype: str) -> Any:
    """A SentenceTransformer that packs its batches.

    Raises:
        RuntimeError: sentence-transformers does not pack this model.
    """
    from sentence_transformers import SentenceTransformer
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

    name = "flash_attention_2" if find_spec("flash_attn") else NAME
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    kwargs = {"dtype": getattr(torch, dtype), "attn_implementation": name}
    model = SentenceTransformer(path, device=device, model_kwargs=kwargs)
    if name == NAME:
        model[0]._is_flash_attention_requested = lambda: True
        # What sentence-transformers looks for before it packs.
        functions = (None, _attend, None, None, None), None
        where = "transformers.modeling_flash_attention_utils.lazy_import_flash_attention"
        with mock.patch(where, lambda *_, **__: functions):
            model[0].unpad_inputs = True
    if not model[0].can_flatten_inputs:
        raise RuntimeError("sentence-transformers does not pack this model")
    return model
