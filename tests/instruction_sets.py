"""The instruction sets on which the C++ ops run here, best first."""

from __future__ import annotations

import torch

from sbert_fast.ops import extension

NATIVE = torch.ops.sbert_fast.cpu_isas().split(",") if extension.CPU.available else []
# But for products of int8, the code of these is that of avx512 and avx2.
OF_FLOATS = [isa for isa in NATIVE if isa not in ("avx512_vnni", "avx_vnni")]
EMULATED_TILES = ["generic_tiles"] if extension.CPU.available else []
WITH_TILES = [isa for isa in NATIVE if isa == "amx_bf16"] + EMULATED_TILES
