"""The emulator finds the mistakes in a kernel that a GPU hides."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest

import cuda_emulation
from cuda_self_test import aligned, run, same, set_order

ORDERS = range(8)

pytestmark = pytest.mark.skipif(
    cuda_emulation.unavailable() is not None, reason=str(cuda_emulation.unavailable())
)


@pytest.fixture(params=[0, 1])
def order(request: pytest.FixtureRequest) -> Iterator[None]:
    """Threads by their numbers, and in a random order."""
    set_order(request.param)
    yield
    set_order(1)


class TestOrders:
    """A result that depends on the order of threads is wrong in one of a few orders."""

    @pytest.mark.parametrize("kernel", ["mirrored", "mirrored_in_warps"])
    def test_a_missing_barrier_shows(self, kernel):
        numbers = np.arange(128, dtype=np.float32)
        warps = numbers.reshape(4, 32)
        expected = (warps[:, ::-1] if "warps" in kernel else warps[::-1, ::-1]).ravel()

        def right(barrier: str, seed: int) -> bool:
            set_order(seed)
            out = run(f"{kernel}<{barrier}>", numbers, np.zeros_like(numbers), threads=128)
            return same(out, expected)

        assert all(right("true", seed) for seed in ORDERS)
        assert not any(right("false", seed) for seed in ORDERS)
        set_order(1)

    def test_an_order_repeats(self):
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
    def test_parted_threads(self, kernel, words):
        with pytest.raises(RuntimeError, match=f"^self_test: {words}"):
            run(kernel, [0], np.zeros(64, np.int32), threads=64)

    def test_a_wait_without_end(self):
        with pytest.raises(RuntimeError, match="nobody can go on: lane 0 of warp 0 waits in count"):
            run("waits", np.int32([1]), np.zeros(64, np.int32), threads=64)

    @pytest.mark.parametrize("kernel", ["loads", "stores", "starts_copies", "loads_matrices"])
    @pytest.mark.parametrize("offset", [0, 4, 16])
    def test_misaligned(self, kernel, offset):
        if offset % 16 == 0:
            run(kernel, [offset], aligned(8), shared=32)
            return
        with pytest.raises(RuntimeError, match="_.*: the address is 4 bytes behind a multiple"):
            run(kernel, [offset], aligned(8), shared=32)

    @pytest.mark.parametrize("kernel", ["starts_copies", "loads_matrices"])
    @pytest.mark.parametrize("offset", [-16, 32, 2**20])
    def test_operations_outside_of_shared_memory(self, kernel, offset):
        with pytest.raises(RuntimeError, match="the address is outside of the block's shared"):
            run(kernel, [offset], aligned(8), shared=32)

    def test_the_wrong_kind_of_memory(self):
        with pytest.raises(RuntimeError, match="store_16: the address is in shared memory"):
            run("stores_to_shared", [0], aligned(4), shared=16)
        with pytest.raises(RuntimeError, match="load_matrices_transposed: the address is outside"):
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
    def test_writes_outside_of_shared_memory(self, offset, words):
        run("writes_shared", [199], aligned(4), shared=200)
        with pytest.raises(RuntimeError, match=words):
            run("writes_shared", [offset], aligned(4), shared=200)

    def test_forbidden_memory(self):
        with pytest.raises(RuntimeError, match="thread 3: an access to forbidden memory"):
            run("writes_nowhere", [0], aligned(4))

    def test_a_deep_stack(self):
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
    def test_a_launch_that_a_gpu_refuses(self, shape, words):
        with pytest.raises(RuntimeError, match=f"^self_test: .*{words}"):
            run("indices", [0], aligned(4), **shape)

    def test_the_next_launch_is_as_good_as_new(self):
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
