"""Argument checks of the public ops: name, what was expected, what came; before any allocation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sbert_fast.ops.reference import POOLING_MODES

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def shape(name: str, tensor: Tensor, expected: Sequence[int | str]) -> None:
    """Check `tensor` against a shape: integers must match, strings are free dimensions."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    fits = tensor.dim() == len(expected) and all(
        isinstance(want, str) or got == want
        for got, want in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, expected))
        raise ValueError(f"{name} must have shape [{wanted}], got {list(tensor.shape)}")


def dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in allowed:
        wanted = " or ".join(str(d)[6:] for d in allowed)
        raise TypeError(f"{name} must be {wanted}, got {str(tensor.dtype)[6:]}")


def device(name: str, tensor: Tensor, expected: torch.device) -> None:
    if tensor.device != expected:
        raise ValueError(f"{name} must be on {expected}, got {tensor.device}")


def activations(name: str, tensor: Tensor, expected: Sequence[int | str]) -> None:
    shape(name, tensor, expected)
    dtype(name, tensor, FLOATS)
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


def integers(name: str, tensor: Tensor, expected: Sequence[int | str], where: torch.device) -> None:
    shape(name, tensor, expected)
    dtype(name, tensor, (torch.int32,))
    device(name, tensor, where)
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


def parameter(
    name: str, tensor: Tensor, expected: Sequence[int | str], where: torch.device
) -> Tensor:
    """Check a parameter and return it as contiguous fp32, or fp64 as it is."""
    shape(name, tensor, expected)
    dtype(name, tensor, FLOATS)
    device(name, tensor, where)
    return tensor if tensor.dtype == torch.float64 else tensor.float().contiguous()


def cu_seqlens_values(cu_seqlens: Tensor, tokens: int, max_seqlen: int | None = None) -> None:
    """Check the values of a host `cu_seqlens`; on a device they are trusted, to save a sync."""
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if isinstance(cu_seqlens, torch._subclasses.FakeTensor):
        return
    if cu_seqlens.numel() == 0:
        raise ValueError("cu_seqlens must have shape [B + 1] with B >= 0, got an empty tensor")
    if int(cu_seqlens[0]) != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {int(cu_seqlens[0])}")
    lengths = cu_seqlens.diff()
    if lengths.numel() and int(lengths.min()) < 0:
        at = int((lengths < 0).nonzero()[0])
        raise ValueError(
            f"cu_seqlens must never decrease, got {int(cu_seqlens[at])} then "
            f"{int(cu_seqlens[at + 1])} at index {at + 1}"
        )
    if int(cu_seqlens[-1]) > tokens:
        raise ValueError(
            f"cu_seqlens must end at or before T = {tokens}, got {int(cu_seqlens[-1])}"
        )
    if max_seqlen is not None and lengths.numel() and int(lengths.max()) > max_seqlen:
        raise ValueError(
            f"max_seqlen must be at least the longest sequence ({int(lengths.max())} tokens), "
            f"got {max_seqlen}"
        )


def pooling_mode(mode: str) -> int:
    if mode not in POOLING_MODES:
        raise ValueError(f"mode must be one of {', '.join(POOLING_MODES)}, got {mode!r}")
    return POOLING_MODES.index(mode)


def norm(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, weight: Tensor, ln_bias: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Check the arguments of a LayerNorm over `x + bias + residual`; its vectors come back fp32."""
    activations("x", x, ("T", "E"))
    width = x.shape[1]
    if bias is not None:
        bias = parameter("bias", bias, (width,), x.device)
    if residual is not None:
        activations("residual", residual, tuple(x.shape))
        dtype("residual", residual, (x.dtype,))
        device("residual", residual, x.device)
    weight = parameter("weight", weight, (width,), x.device)
    return bias, weight, parameter("ln_bias", ln_bias, (width,), x.device)


def pooling(x: Tensor, cu_seqlens: Tensor, mode: str, skip: int, spans: Tensor | None) -> int:
    """Check what the tokens of `x` are pooled by, and return the code of the mode."""
    integers("cu_seqlens", cu_seqlens, ("B + 1",), x.device)
    cu_seqlens_values(cu_seqlens, x.shape[0])
    code = pooling_mode(mode)
    if skip < 0:
        raise ValueError(f"skip must be at least 0, got {skip}")
    if spans is not None:
        integers("spans", spans, ("P", 2), x.device)
    return code


def pooled_rows(
    op: str,
    x: Tensor,
    cu_seqlens: Tensor,
    spans: Tensor | None,
    out: Tensor | None,
    out_rows: Tensor | None,
) -> None:
    """Check where the pooled rows of `x` go."""
    if out is None:
        if out_rows is not None:
            raise ValueError("out_rows was given without out: pass both or neither")
        return
    rows = cu_seqlens.shape[0] - 1 if spans is None else spans.shape[0]
    shape("out", out, ("N", x.shape[1]))
    dtype("out", out, (torch.float32,))
    device("out", out, x.device)
    no_grad(op, x, out)
    if out_rows is not None:
        integers("out_rows", out_rows, (rows,), x.device)
    elif out.shape[0] < rows:
        raise ValueError(f"out must have at least {rows} rows, got {out.shape[0]}")


def no_grad(op: str, *tensors: Tensor | None) -> None:
    """Refuse inputs whose gradient would be lost by an op that writes into `out`."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise NotImplementedError(
            f"{op} with out= has no backward: call it under torch.inference_mode() or without out="
        )
