"""Rows of the tuning table at work: whether one may be used, and how long its kernels take."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from benchmarks.common.stopwatch import Call, Timing, cold_sets, take_turns
from benchmarks.ops.cases import HEADS, lengths_of, randn
from benchmarks.tune.table import Key, Step
from sbert_fast.bench.names import message
from sbert_fast.kernels import aot, tuning, varlen_attention
from sbert_fast.kernels.tuning import Attention
from sbert_fast.kernels.varlen_attention import Launch, Options
from sbert_fast.packing import plan_tiles
from sbert_fast.testing import pack_lengths

TOKENS = 1 << 16
# One below, at and above the sizes of slots and blocks; all of them, and those of near batches.
RAGGED = (0, 1, 15, 16, 17, 31, 32, 33, 0, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512)
_REACH, _WINDOW = 40, 50


@dataclass(frozen=True)
class Variant:
    """A kind of attention whose bits a row must keep; that of a `decoder` is causal and normed."""

    dtype: torch.dtype
    dim: int
    bias: bool = False
    window: bool = False
    rotary: bool = False
    decoder: bool = False
    disentangled: bool = False

    def shape(self, tokens: int, heads: int) -> tuple[int, ...]:
        """That of qkv; in a decoder, all heads share one of keys and values."""
        return (tokens, heads + 2, self.dim) if self.decoder else (tokens, 3, heads, self.dim)


# A kernel, the longest sequence of its batch, and the variant.
Use = tuple[str, int, Variant]


@dataclass(frozen=True)
class Given:
    """A batch: sets of qkv with out `[T, H, D]`, and what goes with all of them."""

    sets: list[tuple[Tensor, Tensor]]
    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    tiles: Tensor
    variant: Variant
    tables: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    more: Options = Options()


class Lab:
    """Rows under one key, on a device.

    Args:
        key, original: the row whose bits all others must give.
        tokens: of a batch that is timed.
        heads: of all batches.
        ragged: lengths of the batch that is not timed.
    """

    def __init__(
        self,
        key: Key,
        original: Attention,
        device: torch.device,
        tokens: int = TOKENS,
        heads: int = HEADS,
        ragged: tuple[int, ...] = RAGGED,
    ) -> None:
        self.key, self.original, self.device = key, original, device
        self.tokens, self.heads, self.ragged = tokens, heads, ragged
        cuda = device.type == "cuda"
        self.capability = torch.cuda.get_device_capability(device) if cuda else (9, 0)
        bits, dim = key
        self.plain = Variant(torch.float16 if bits == 16 else torch.float32, dim)
        # Room for the last sequence of a batch.
        most = tokens + tokens // 8 + 512
        bytes_of_a_call = 4 * tokens * heads * dim * bits // 8
        self._sets = [
            self._set(self.plain, most, seed) for seed in range(cold_sets(device, bytes_of_a_call))
        ]
        self._expected: dict[tuple[Any, ...], tuple[Tensor, int]] = {}

    def _set(self, variant: Variant, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
        shape = variant.shape(tokens, self.heads)
        qkv = randn(self.device, variant.dtype, *shape, seed=seed)
        return qkv, qkv.new_empty(tokens, self.heads, variant.dim)

    def timed(self, name: str) -> Given:
        """The batch of a name of `benchmarks.ops.cases.lengths_of`."""
        lengths = lengths_of(name, self.tokens)
        sets = [(qkv[: sum(lengths)], out[: sum(lengths)]) for qkv, out in self._sets]
        return self._given(sets, tuple(lengths), self.plain)

    def _given(
        self, sets: list[tuple[Tensor, Tensor]], lengths: tuple[int, ...], variant: Variant
    ) -> Given:
        tiles = torch.from_numpy(plan_tiles(np.array(lengths, np.int32))).to(self.device)
        cu_seqlens = pack_lengths(lengths).to(self.device)
        bias = cos = sin = None
        if variant.bias:
            bias = torch.linspace(-1, 1, self.heads * (2 * _REACH + 1), device=self.device)
            bias = bias.view(self.heads, -1)
        if variant.rotary:
            angles = torch.arange(sum(lengths), device=self.device)[:, None] * 0.37
            angles = angles * torch.linspace(1, 0.01, variant.dim // 2, device=self.device)
            cos, sin = angles.cos(), angles.sin()
        more = Options()
        if variant.decoder:
            norm = torch.linspace(0.5, 1.5, variant.dim, device=self.device)
            more = Options(True, 1, norm, norm.flip(0), 1e-6)
        if variant.disentangled:
            distances = 2 * _REACH + 1
            rows = randn(self.device, variant.dtype, self.heads, distances, variant.dim, seed=2)
            buckets = torch.arange(distances, dtype=torch.int32, device=self.device)
            more = Options(position_keys=rows, position_queries=-rows, buckets=buckets)
        return Given(sets, lengths, cu_seqlens, tiles, variant, (bias, cos, sin), more)

    def variants(self) -> list[Variant]:
        """What a row is used for besides what is timed."""
        bits, width = self.key
        dtype, odd = self.plain.dtype, width - 6
        kinds = [
            Variant(dtype, odd),
            Variant(dtype, width, bias=True),
            Variant(dtype, width, window=True),
            Variant(dtype, width, rotary=True),
            Variant(dtype, odd, bias=True, window=True, rotary=True),
            Variant(dtype, width, rotary=True, decoder=True),
            Variant(dtype, width, disentangled=True),
        ]
        # The interpreter multiplies bf16 wrongly.
        if bits == 16 and self.device.type == "cuda":
            kinds.append(Variant(torch.bfloat16, width))
        return kinds

    @contextmanager
    def _as_row(self, row: Attention) -> Iterator[None]:
        table, kept = tuning._ATTENTION, tuning._ATTENTION[self.key]
        table[self.key] = row
        try:
            yield
        finally:
            table[self.key] = kept

    def launches(
        self,
        row: Attention,
        given: Given,
        number: int = 0,
        capability: tuple[int, int] | None = None,
    ) -> list[Launch]:
        """What a set of a batch launches with `row` in the table."""
        qkv, out = given.sets[number]
        longest = max(given.lengths)
        scale = given.variant.dim**-0.5
        window = _WINDOW if given.variant.window else -1
        rest = (scale, window, given.tables, given.tiles, capability or self.capability, given.more)
        with self._as_row(row):
            return list(varlen_attention.plan(qkv, out, given.cu_seqlens, longest, *rest))

    def compile(self, rows: Sequence[Attention], batches: Sequence[Given]) -> None:
        """Compile what these rows launch, on all cores where Triton can.

        It only saves time: what fails here fails again, and is told, where it is launched.
        """
        if self.device.type != "cuda" or not hasattr(triton, "AsyncCompileMode"):
            return
        with (
            suppress(Exception),
            ThreadPoolExecutor(os.cpu_count()) as pool,
            triton.AsyncCompileMode(pool, ignore_errors=True),
        ):
            for row in rows:
                for given in batches:
                    for kernel, programs, arguments, options in self.launches(row, given):
                        kernel.warmup(*arguments, grid=(programs,), **options)

    def _result(self, row: Attention, given: Given) -> tuple[Tensor, int]:
        """What a row makes of the first set of a batch, and the registers that a thread spills."""
        out = given.sets[0][1].fill_(float("nan"))
        spills = 0
        for kernel, programs, arguments, options in self.launches(row, given):
            compiled = kernel[(programs,)](*arguments, **options)
            if self.device.type == "cuda":
                spills = max(spills, compiled.n_spills)
        return out.clone(), spills

    def _differs(self, row: Attention, given: Given, timed: bool) -> str | None:
        """Why a row cannot compute a batch: it fails, spills (where that is not timed, more than
        the original), or gives other bits."""
        try:
            batch = (given.variant, given.lengths)
            if batch not in self._expected:
                self._expected[batch] = self._result(self.original, given)
            expected, most_spills = self._expected[batch]
            out, spills = self._result(row, given)
            if spills > (0 if timed else most_spills):
                return "spills"
            # Bytes: a NaN, which no row may leave, is not equal to itself.
            same = torch.equal(out.view(torch.uint8), expected.view(torch.uint8))
            return None if same and torch.isfinite(out).all() else "other bits"
        except Exception as error:
            return message(error)

    def refusal(self, step: Step, row: Attention) -> str | None:
        """Why a row cannot compute the batches that a step times; None where it can."""
        found = (self._differs(row, self.timed(name), timed=True) for name in step.inputs(row))
        return next((reason for reason in found if reason), None)

    def prepare(self, step: Step, rows: Sequence[Attention]) -> None:
        """Compile what a step will launch."""
        batches = [self.timed(name) for name in step.inputs(self.original)]
        self.compile([self.original, *rows], batches)

    def times(self, step: Step, rows: Sequence[Attention], samples: int) -> dict[str, list[Timing]]:
        """Timings of every row on every batch of a step, taken in turn."""
        times = {}
        for name in step.inputs(self.original):
            given = self.timed(name)
            systems = {str(i): self._call(row, given) for i, row in enumerate(rows)}
            timings = take_turns(systems, len(given.sets), self.device, samples)
            times[name] = [timings[name] for name in systems]
        return times

    def _call(self, row: Attention, given: Given) -> Call:
        planned = [self.launches(row, given, i) for i in range(len(given.sets))]

        def call(number: int) -> None:
            for kernel, programs, arguments, options in planned[number]:
                kernel[(programs,)](*arguments, **options)

        return call

    def refusal_elsewhere(self, row: Attention) -> str | None:
        """Why a row cannot be used for other lengths and options, or on other devices."""
        batches = []
        for variant in self.variants():
            for lengths in (self.ragged, tuple(n for n in self.ragged if n <= 256)):
                sets = [self._set(variant, sum(lengths), seed=1)]
                batches.append(self._given(sets, lengths, variant))
        self.compile([self.original, row], batches)
        for given in batches:
            if reason := self._differs(row, given, timed=False):
                return f"{reason} with {given.variant}"
        return self.misfit(row, aot.ARCHS)

    def misfit(self, row: Attention, archs: Sequence[int]) -> str | None:
        """Why the kernels of a row would not do on some device: one does not fit, or it spills more
        than that of the original row."""

        def compiled(builds: dict[Use, tuple[aot.Build, aot.Build]]) -> str | None:
            pairs = [build for pair in builds.values() for build in pair]
            try:
                usages = aot.compile_all(pairs)
            except (AssertionError, OSError) as error:
                named = re.findall(r"^[\w.]*Error\b.*", str(error), re.M) or [message(error)]
                return f"sm_{pairs[0].arch}: {named[-1]}"[:160]
            for use, old, new, build in zip(
                builds, usages[::2], usages[1::2], pairs[1::2], strict=True
            ):
                if new.stack > old.stack or new.blocks(build.arch) < 1:
                    return f"sm_{build.arch}: spills or does not fit, {use}"
            return None

        changed = []
        for arch in archs:
            old, new = (self.builds(each, arch) for each in (self.original, row))
            changed.append({use: (old[use], new[use]) for use in old if old[use] != new[use]})
        with ThreadPoolExecutor(len(archs)) as pool:
            refusals = pool.map(compiled, filter(None, changed))
            return next((reason for reason in refusals if reason), None)

    def builds(self, row: Attention, arch: int) -> dict[Use, aot.Build]:
        """All kernels that a row launches on `arch`, by what they are used for."""
        found = {}
        for variant in (self.plain, *self.variants()):
            for longest in (16, 64, 512):
                given = self._given([], (longest,) * 2, variant)
                shape = variant.shape(2 * longest, self.heads)
                qkv = torch.empty(*shape, dtype=variant.dtype, device="meta")
                given.sets.append((qkv, qkv))
                for launch in self.launches(row, given, 0, (arch // 10, arch % 10)):
                    use = (launch.kernel.fn.__name__, longest, variant)
                    found[use] = aot.build_of(launch.kernel, launch.arguments, launch.options, arch)
        return found
