"""The emulator that runs CUDA kernels on a CPU does what a GPU does, and finds what a GPU hides."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import cuda_emulation

ORDERS = range(8)
NAN_WORD = 0xFFFFFFFF
DTYPES = {"Half": torch.float16, "BFloat16": torch.bfloat16}


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    source = cuda_emulation.EMULATOR / "self_test.cu"
    return ctypes.CDLL(str(cuda_emulation.build("self_test", [source])))


@pytest.fixture(params=[0, 1])
def order(library: ctypes.CDLL, request: pytest.FixtureRequest) -> Iterator[None]:
    """Threads by their numbers, and in a random order."""
    library.sbf_emulation_set_order(ctypes.c_uint64(request.param))
    yield
    library.sbf_emulation_set_order(ctypes.c_uint64(1))


@pytest.fixture
def run(library: ctypes.CDLL) -> Callable[..., np.ndarray]:
    """Runs a kernel of self_test.cu on an input and an output, which it returns."""

    def call(
        kernel: str,
        source: Any,
        out: np.ndarray,
        *,
        blocks: int = 1,
        threads: int = 32,
        shared: int = 0,
    ) -> np.ndarray:
        source = np.ascontiguousarray(source)
        error = ctypes.create_string_buffer(1000)
        library.sbf_self_test(
            kernel.encode(),
            ctypes.c_void_p(source.ctypes.data),
            ctypes.c_void_p(out.ctypes.data),
            ctypes.c_int64(blocks),
            threads,
            ctypes.c_size_t(shared),
            error,
            ctypes.c_size_t(len(error)),
        )
        if error.value:
            raise RuntimeError(error.value.decode())
        return out

    return call


def aligned(words: int) -> np.ndarray:
    """Zeros, uint32, that begin at a multiple of 16 bytes."""
    memory = np.zeros(words + 4, np.uint32)
    first = -memory.ctypes.data % 16 // 4
    return memory[first : first + words]


def bits(x: torch.Tensor) -> np.ndarray:
    return x.view(torch.int16).numpy().view(np.uint16)


def same(a: np.ndarray, b: Any) -> bool:
    return np.array_equal(a, b, equal_nan=True)


def every_number(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.usefixtures("order")
class TestFunctions:
    def test_indices(self, run):
        out = run("indices", [0], np.zeros((3, 64, 4), np.int32), blocks=3, threads=64)
        block, thread = np.mgrid[:3, :64]
        assert same(out, np.stack([thread, 0 * thread + 64, block, 0 * block + 3], -1))

    def test_no_blocks(self, run):
        assert same(run("indices", [0], np.zeros(1, np.int32), blocks=0), [0])

    @pytest.mark.parametrize("kind", ["int32_t", "int64_t", "float"])
    def test_shuffles(self, run, kind):
        dtype = np.dtype(kind.removesuffix("_t") + ("32" if kind == "float" else ""))
        lanes = np.arange(32)
        other = np.random.default_rng(0).integers(0, 32, 32)
        values = (lanes * 3 + 1).astype(dtype) * (2**40 + 1 if kind == "int64_t" else 1)
        out = run(f"shuffles<{kind}>", np.stack([values, other]).astype(dtype), np.zeros(96, dtype))
        above = np.where(lanes >= other, lanes - other, lanes)
        assert same(out.reshape(3, 32), values[np.stack([other, lanes ^ other, above])])

    def test_ballot(self, run):
        votes = np.random.default_rng(0).integers(0, 2, 64).astype(np.int32)
        out = run("ballots", votes, np.zeros((2, 64), np.uint32), threads=64)
        for warp in range(2):
            word = sum(int(vote) << lane for lane, vote in enumerate(votes[32 * warp :][:32]))
            lanes = slice(32 * warp, 32 * warp + 32)
            assert (out[0, lanes] == word).all()
            assert (out[1, lanes] == np.flatnonzero(votes[lanes])[0]).all()

    def test_arithmetic(self, run):
        numbers = np.random.default_rng(0).uniform(0.01, 60, (64, 3)).astype(np.float32)
        out = run("functions", numbers, np.zeros((64, 5), np.float32), threads=64)
        x, y, z = numbers.astype(np.float64).T
        expected = np.stack([np.exp2(x), 1 / x, x**-0.5, x * y + z, np.full(64, np.inf)], -1)
        np.testing.assert_allclose(out, expected, rtol=3e-7)

    def test_exp2_of_special_numbers(self, run):
        numbers = np.zeros((32, 3), np.float32)
        numbers[:5, 0] = [-np.inf, -127, -126, np.inf, np.nan]
        out = run("functions", numbers, np.zeros((32, 5), np.float32))
        assert same(out[:5, 0], np.float32([0, 0, 2.0**-126, np.inf, np.nan]))

    @pytest.mark.parametrize("name", DTYPES)
    def test_pack(self, run, name):
        dtype = DTYPES[name]
        numbers = every_number(dtype).float()
        # Each number, the middle between neighbours, and what lies just beside the middle.
        middle = ((numbers.double() + numbers.double().roll(1)) / 2).float()
        inf = torch.tensor(torch.inf)
        beside = [torch.nextafter(middle, inf), torch.nextafter(middle, -inf)]
        numbers = torch.cat([numbers, middle, *beside])
        out = np.zeros(len(numbers) // 2, np.uint32)
        run(f"packs<{name}>", numbers.numpy(), out, blocks=len(out) // 1024, threads=1024)
        packed = torch.from_numpy(out.view(np.int16)).view(dtype)
        assert same(packed.float().numpy(), numbers.to(dtype).float().numpy())
        assert same(packed.signbit()[~packed.isnan()], numbers.signbit()[~packed.isnan()])

    @pytest.mark.parametrize("name", DTYPES)
    def test_unpack(self, run, name):
        numbers = every_number(DTYPES[name])
        out = np.zeros(len(numbers), np.float32)
        run(f"unpacks<{name}>", bits(numbers), out, blocks=len(out) // 2048, threads=1024)
        assert same(out, numbers.float().numpy())

    @pytest.mark.parametrize("name", DTYPES)
    def test_mma(self, run, name):
        torch.manual_seed(0)
        a, b, d = torch.randn(16, 16), torch.randn(16, 8), torch.randn(16, 8)
        a, b = a.to(DTYPES[name]), b.to(DTYPES[name])
        out = run(f"products<{name}>", bits(torch.cat([a, b.T])), d.clone().numpy())
        expected = d.double() + a.double() @ b.double()
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)

    def test_mma_of_nan(self, run):
        a, b = torch.ones(16, 16), torch.ones(16, 8)
        a[3, 5], b[7, 2] = torch.nan, torch.inf
        numbers = bits(torch.cat([a, b.T]).half())
        out = run("products<Half>", numbers, np.zeros((16, 8), np.float32))
        assert same(out, (a.double() @ b.double()).float().numpy())

    def test_transpose(self, run):
        matrix = np.arange(64, dtype=np.uint16).reshape(8, 8)
        assert same(run("transposes", matrix, np.zeros_like(matrix)), matrix.T)

    def test_load_matrices(self, run):
        source, out = aligned(128), aligned(256)
        matrices = source.view(np.uint16).reshape(4, 8, 8)
        matrices[:] = np.arange(256).reshape(4, 8, 8)
        run("matrices", source, out, shared=512)
        # [as they are or transposed, lane, matrix, neighbour]
        loaded = out.view(np.uint16).reshape(2, 32, 4, 2)
        assert same(loaded[0], matrices.reshape(4, 32, 2).swapaxes(0, 1))
        assert same(loaded[1], matrices.swapaxes(1, 2).reshape(4, 32, 2).swapaxes(0, 1))

    def test_async_copies_happen_when_they_are_waited_for(self, run):
        out = aligned(16)
        out[0] = 41
        run("copies", [0], out, shared=32)
        before, between, behind = out[4:10].reshape(3, 2)
        assert same(before, [NAN_WORD, NAN_WORD])
        assert same(between, [42, NAN_WORD])
        assert same(behind, [42, 0])

    def test_no_wait_covers_an_open_group(self, run):
        out = run("open_copies", aligned(4), np.zeros(32, np.uint32), shared=512)
        assert (out == NAN_WORD).all()

    def test_shared_memory_is_poisoned_for_every_block(self, run):
        out = run("fresh_memory", [0], aligned(3 * 192), blocks=3, threads=64, shared=256)
        assert (out == NAN_WORD).all()

    def test_wait_until(self, run):
        out = run("waits", np.int32([0]), np.zeros(64, np.int32), threads=64)
        assert same(out, np.arange(64)[::-1])


class TestOrders:
    """A result that depends on the order of threads is wrong in one of a few orders."""

    @pytest.mark.parametrize("kernel", ["mirrored", "mirrored_in_warps"])
    def test_a_missing_barrier_shows(self, run, library, kernel):
        numbers = np.arange(128, dtype=np.float32)
        warps = numbers.reshape(4, 32)
        expected = (warps[:, ::-1] if "warps" in kernel else warps[::-1, ::-1]).ravel()

        def right(barrier: str, seed: int) -> bool:
            library.sbf_emulation_set_order(ctypes.c_uint64(seed))
            out = run(f"{kernel}<{barrier}>", numbers, np.zeros_like(numbers), threads=128)
            return same(out, expected)

        assert all(right("true", seed) for seed in ORDERS)
        assert not any(right("false", seed) for seed in ORDERS)

    def test_an_order_repeats(self, run):
        numbers = np.arange(128, dtype=np.float32)
        first, second = (
            run("mirrored<false>", numbers, np.zeros_like(numbers), threads=128) for _ in range(2)
        )
        assert same(first, second)


@pytest.mark.usefixtures("order")
class TestReports:
    """Each mistake, and the words of its report."""

    @pytest.mark.parametrize(
        ("kernel", "words"),
        [
            ("different_operations", r"block 0, thread \d+: the lanes of warp 1 have parted: .*"),
            ("different_operations", r".*\b(shuffle) \(self_test.cu:\d+\)"),
            ("different_operations", r".*\b(ballot) \(self_test.cu:\d+\)"),
            ("different_places", r".* have parted: .* sync_warp \(.*\), .* sync_warp \("),
            ("absent_lane", r".* lane 0 of warp 1 waits in sync_warp \(.*\), lane 5 has returned"),
            ("absent_warp", r".* warp 0 waits in sync_block \(.*\), warp 1 has returned"),
        ],
    )
    def test_parted_threads(self, run, kernel, words):
        with pytest.raises(RuntimeError, match=f"^self_test: {words}"):
            run(kernel, [0], np.zeros(64, np.int32), threads=64)

    def test_a_wait_without_end(self, run):
        with pytest.raises(RuntimeError, match="nobody can go on: lane 0 of warp 0 waits in count"):
            run("waits", np.int32([1]), np.zeros(64, np.int32), threads=64)

    @pytest.mark.parametrize("kernel", ["loads", "stores", "starts_copies", "loads_matrices"])
    @pytest.mark.parametrize("offset", [0, 4, 16])
    def test_misaligned(self, run, kernel, offset):
        if offset % 16 == 0:
            run(kernel, [offset], aligned(8), shared=32)
            return
        with pytest.raises(RuntimeError, match="_.*: the address is 4 bytes behind a multiple"):
            run(kernel, [offset], aligned(8), shared=32)

    @pytest.mark.parametrize("kernel", ["starts_copies", "loads_matrices"])
    @pytest.mark.parametrize("offset", [-16, 32, 2**20])
    def test_operations_outside_of_shared_memory(self, run, kernel, offset):
        with pytest.raises(RuntimeError, match="the address is outside of the block's shared"):
            run(kernel, [offset], aligned(8), shared=32)

    def test_the_wrong_kind_of_memory(self, run):
        with pytest.raises(RuntimeError, match="store_16: the address is in shared memory"):
            run("stores_to_shared", [0], aligned(4), shared=16)
        with pytest.raises(RuntimeError, match="load_matrices: the address is outside"):
            run("loads_matrix_of_global", [0], aligned(4), shared=16)

    @pytest.mark.parametrize(
        ("offset", "words"),
        [
            (-1, "block 0 wrote in front of its 200 bytes of shared memory"),
            (200, "block 0 wrote behind its 200 bytes of shared memory"),
            (-100_000, "thread 3: an access 100000 bytes in front of shared memory"),
            (300, "thread 3: an access 100 bytes behind the end of shared memory"),
        ],
    )
    def test_writes_outside_of_shared_memory(self, run, offset, words):
        run("writes_shared", [199], aligned(4), shared=200)
        with pytest.raises(RuntimeError, match=words):
            run("writes_shared", [offset], aligned(4), shared=200)

    def test_forbidden_memory(self, run):
        with pytest.raises(RuntimeError, match="thread 3: an access to forbidden memory"):
            run("writes_nowhere", [0], aligned(4))

    def test_a_deep_stack(self, run):
        assert run("recurses", np.int64([10]), np.zeros(32, np.int32))[7] == 10
        with pytest.raises(RuntimeError, match=r"thread \d+: its stack has overflowed"):
            run("recurses", np.int64([10_000]), np.zeros(32, np.int32))

    @pytest.mark.parametrize(
        ("shape", "words"),
        [
            ({"threads": 33}, "a block must have 32, 64, ... or 1024 threads"),
            ({"threads": 2048}, "a block must have 32, 64, ... or 1024 threads"),
            ({"shared": 228 * 1024}, "at most 227 KiB of shared memory"),
            ({"blocks": 2**31}, "the input is too large for one launch"),
        ],
    )
    def test_a_launch_that_a_gpu_refuses(self, run, shape, words):
        with pytest.raises(RuntimeError, match=f"^self_test: .*{words}"):
            run("indices", [0], aligned(4), **shape)

    def test_the_next_launch_is_as_good_as_new(self, run):
        with pytest.raises(RuntimeError):
            run("absent_lane", [0], np.zeros(64, np.int32), threads=64)
        out = run("indices", [0], np.zeros((32, 4), np.int32))
        assert same(out[:, 0], np.arange(32))


def test_a_failed_build_says_why(tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text("int broken( { return 0; }\n")
    with pytest.raises(cuda_emulation.BuildError, match="broken.cu:1:.* error: expected"):
        cuda_emulation.build("broken", [source])


def test_kernels_use_nothing_but_device_functions():
    """What would bypass device.cuh, and with it the emulator."""
    forbidden = re.compile(
        r"__shfl|__sync|__shared__|\basm\b|threadIdx|blockIdx|<<<|#include <cuda"
    )
    folder = cuda_emulation.ROOT / "csrc/cuda"
    wrappers = {"device.cuh", "launch.cuh", "hopper.cuh"}
    sources = [path for path in folder.glob("*.cu*") if path.name not in wrappers]
    for path in [*sources, cuda_emulation.EMULATOR / "self_test.cu"]:
        assert not forbidden.findall(path.read_text()), path.name
