"""The functions of csrc/cuda/device.cuh do on a CPU what they do on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import cuda_emulation
from cuda_self_test import NAN_WORD, aligned, run, same, set_order

DTYPES = {"Half": torch.float16, "BFloat16": torch.bfloat16}

pytestmark = pytest.mark.skipif(
    cuda_emulation.unavailable() is not None, reason=str(cuda_emulation.unavailable())
)


@pytest.fixture(params=[0, 1], autouse=True)
def order(request: pytest.FixtureRequest) -> Iterator[None]:
    """Threads by their numbers, and in a random order."""
    set_order(request.param)
    yield
    set_order(1)


def bits(x: torch.Tensor) -> np.ndarray:
    return x.view(torch.int16).numpy().view(np.uint16)


def every_number(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


class TestFunctions:
    def test_indices(self):
        out = run("indices", [0], np.zeros((3, 64, 4), np.int32), blocks=3, threads=64)
        block, thread = np.mgrid[:3, :64]
        assert same(out, np.stack([thread, 0 * thread + 64, block, 0 * block + 3], -1))

    def test_no_blocks(self):
        assert same(run("indices", [0], np.zeros(1, np.int32), blocks=0), [0])

    @pytest.mark.parametrize("kind", ["int32_t", "int64_t", "float"])
    def test_shuffles(self, kind):
        dtype = np.dtype(kind.removesuffix("_t") + ("32" if kind == "float" else ""))
        lanes = np.arange(32)
        other = np.random.default_rng(0).integers(0, 32, 32)
        values = (lanes * 3 + 1).astype(dtype) * (2**40 + 1 if kind == "int64_t" else 1)
        out = run(f"shuffles<{kind}>", np.stack([values, other]).astype(dtype), np.zeros(96, dtype))
        above = np.where(lanes >= other, lanes - other, lanes)
        assert same(out.reshape(3, 32), values[np.stack([other, lanes ^ other, above])])

    def test_ballot(self):
        votes = np.random.default_rng(0).integers(0, 2, 64).astype(np.int32)
        out = run("ballots", votes, np.zeros((2, 64), np.uint32), threads=64)
        for warp in range(2):
            word = sum(int(vote) << lane for lane, vote in enumerate(votes[32 * warp :][:32]))
            lanes = slice(32 * warp, 32 * warp + 32)
            assert (out[0, lanes] == word).all()
            assert (out[1, lanes] == np.flatnonzero(votes[lanes])[0]).all()

    def test_arithmetic(self):
        numbers = np.random.default_rng(0).uniform(0.01, 60, (64, 3)).astype(np.float32)
        out = run("functions", numbers, np.zeros((64, 5), np.float32), threads=64)
        x, y, z = numbers.astype(np.float64).T
        expected = np.stack([np.exp2(x), 1 / x, x**-0.5, x * y + z, np.full(64, np.inf)], -1)
        np.testing.assert_allclose(out, expected, rtol=3e-7)

    def test_exp2_of_special_numbers(self):
        numbers = np.zeros((32, 3), np.float32)
        numbers[:5, 0] = [-np.inf, -127, -126, np.inf, np.nan]
        out = run("functions", numbers, np.zeros((32, 5), np.float32))
        assert same(out[:5, 0], np.float32([0, 0, 2.0**-126, np.inf, np.nan]))

    @pytest.mark.parametrize("name", DTYPES)
    def test_pack(self, name):
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
    def test_unpack(self, name):
        numbers = every_number(DTYPES[name])
        out = np.zeros(len(numbers), np.float32)
        run(f"unpacks<{name}>", bits(numbers), out, blocks=len(out) // 2048, threads=1024)
        assert same(out, numbers.float().numpy())

    @pytest.mark.parametrize("name", DTYPES)
    def test_mma(self, name):
        torch.manual_seed(0)
        a, b, d = torch.randn(16, 16), torch.randn(16, 8), torch.randn(16, 8)
        a, b = a.to(DTYPES[name]), b.to(DTYPES[name])
        out = run(f"products<{name}>", bits(torch.cat([a, b.T])), d.clone().numpy())
        expected = d.double() + a.double() @ b.double()
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)

    def test_mma_of_nan(self):
        a, b = torch.ones(16, 16), torch.ones(16, 8)
        a[3, 5], b[7, 2] = torch.nan, torch.inf
        numbers = bits(torch.cat([a, b.T]).half())
        out = run("products<Half>", numbers, np.zeros((16, 8), np.float32))
        assert same(out, (a.double() @ b.double()).float().numpy())

    def test_transpose(self):
        matrix = np.arange(64, dtype=np.uint16).reshape(8, 8)
        assert same(run("transposes", matrix, np.zeros_like(matrix)), matrix.T)

    def test_load_matrices(self):
        source, out = aligned(128), aligned(128)
        matrices = source.view(np.uint16).reshape(4, 8, 8)
        matrices[:] = np.arange(256).reshape(4, 8, 8)
        run("matrices", source, out, shared=512)
        # [lane, matrix, neighbour]
        loaded = out.view(np.uint16).reshape(32, 4, 2)
        assert same(loaded, matrices.swapaxes(1, 2).reshape(4, 32, 2).swapaxes(0, 1))

    def test_async_copies_happen_when_they_are_waited_for(self):
        out = aligned(16)
        out[0] = 41
        run("copies", [0], out, shared=32)
        before, between, behind = out[4:10].reshape(3, 2)
        assert same(before, [NAN_WORD, NAN_WORD])
        assert same(between, [42, NAN_WORD])
        assert same(behind, [42, 0])

    def test_no_wait_covers_an_open_group(self):
        out = run("open_copies", aligned(4), np.zeros(32, np.uint32), shared=512)
        assert (out == NAN_WORD).all()

    def test_shared_memory_is_poisoned_for_every_block(self):
        out = run("fresh_memory", [0], aligned(3 * 192), blocks=3, threads=64, shared=256)
        assert (out == NAN_WORD).all()

    def test_wait_until(self):
        out = run("waits", np.int32([0]), np.zeros(64, np.int32), threads=64)
        assert same(out, np.arange(64)[::-1])

    def test_memory_is_poisoned_for_every_calling_thread(self):
        def launch() -> np.ndarray:
            return run("fresh_memory", [0], aligned(192), threads=64, shared=256).copy()

        with ThreadPoolExecutor(4) as pool:
            results = [pool.submit(launch) for _ in range(16)]
        assert all((result.result() == NAN_WORD).all() for result in results)
