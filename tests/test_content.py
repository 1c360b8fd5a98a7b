"""The hash that tells whether weights still hold what they held."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

import sbert_fast.kernels as kernels
from op_cases import ARCHS
from sbert_fast.kernels import aot
from sbert_fast.ops import content, extension
from sbert_fast.ops.content import ContentHash

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [torch.bool, torch.bfloat16, torch.float32, torch.complex64]
# Each makes a tensor of a dtype from enough bytes of it.
MATRICES: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda x: x[: 130 * 40].view(130, 40),
    "odd rows": lambda x: x[: 131 * 37].view(131, 37),
    "long rows": lambda x: x[: 3 * 2000].view(3, 2000),
    "short rows": lambda x: x[: 1500 * 3].view(1500, 3),
    "one column": lambda x: x[:4100].view(4100, 1),
    "misaligned": lambda x: x[1 : 130 * 40 + 1].view(130, 40),
    "transposed": lambda x: x[: 130 * 40].view(40, 130).t(),
    "some columns": lambda x: x[: 130 * 60].view(130, 60)[:, 3:43],
    "every second row": lambda x: x[: 260 * 40].view(260, 40)[::2],
    "every second column": lambda x: x[: 130 * 80].view(130, 80)[:, ::2],
    "one row, expanded": lambda x: x[:40].expand(130, 40),
    "one value a row, expanded": lambda x: x[:130].view(130, 1).expand(130, 40),
    "overlapping": lambda x: x.as_strided((130, 40), (1, 1)),
    "convolution": lambda x: x[: 40 * 12 * 9].view(40, 12, 3, 3),
    "channels last": lambda x: x[: 40 * 12 * 9].view(40, 3, 3, 12).permute(0, 3, 1, 2),
    "some channels": lambda x: x[: 12 * 14 * 40].view(12, 14, 40)[:, :11],
}
SMALL: dict[str, Callable[[Tensor], Tensor]] = {
    "scalar": lambda x: x[5],
    "vector": lambda x: x[:37],
    "long vector": lambda x: x[:4501],
    "every third": lambda x: x[: 3 * 700 : 3],
    "matrix": lambda x: x[: 60 * 61].view(60, 61),
    "transposed": lambda x: x[: 60 * 61].view(60, 61).t(),
    "some of three dims": lambda x: x[: 10 * 10 * 10].view(10, 10, 10)[:, 1:9, ::2],
}


@pytest.fixture(params=["compiled", "torch", "triton"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where tensors of the test are, hashed by one implementation."""
    if request.param == "compiled":
        if not hasattr(torch.ops.sbert_fast, "content_hash"):
            pytest.skip("sbert_fast/_C was not built")
        return "cpu"
    missing = extension.Extension("_C", None, "the library is missing")
    monkeypatch.setattr(extension, "CPU", missing)
    if request.param == "triton":
        where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if (reason := kernels.refusal(where)) is not None:
            pytest.skip(reason)
        monkeypatch.setattr(content, "_reader", content.triton_reader)
        return where.type
    return "cpu"


def random(dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """A vector of random bits, NaN and -0.0 among them."""
    generator = torch.Generator().manual_seed(0)
    limit = 2 if dtype == torch.bool else 256
    values = torch.randint(limit, (11_000 * dtype.itemsize,), generator=generator)
    return values.to(torch.uint8).to(device).view(dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(BITS[tensor.element_size()])


def places(hashed: ContentHash, shape: Sequence[int]) -> list[tuple[int, ...]]:
    """Every place of a tensor; a few and the last where the implementation is slow."""
    found = list(itertools.product(*map(range, shape)))
    return found if hashed._compiled else [*found[:: len(found) // 3 or 1], found[-1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MATRICES)
def test_every_row_is_seen(device: str, kind: str, dtype: torch.dtype) -> None:
    tensor = MATRICES[kind](random(dtype, device))
    assert tensor.numel() > content.WHOLE
    hashed = ContentHash([tensor])
    before = hashed()
    for index in places(hashed, tensor.shape[:-1]):
        row = bits(tensor)[index]
        # An expanded row repeats one element.
        row = row[:1] if row.stride(0) == 0 else row
        row ^= 1
        assert hashed() != before, index
        row ^= 1
    assert hashed() == before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", SMALL)
def test_every_bit_of_a_small_tensor_is_seen(device: str, kind: str, dtype: torch.dtype) -> None:
    tensor = SMALL[kind](random(dtype, device))
    hashed = ContentHash([tensor])
    before = hashed()
    for place in places(hashed, tensor.shape):
        bits(tensor)[place] ^= 1
        assert hashed() != before, place
        bits(tensor)[place] ^= 1
    assert hashed() == before


GEOMETRIES: dict[str, Callable[[Tensor], Tensor]] = {
    "strides": lambda x: x.t(),
    "shape": lambda x: x.view(-1),
    "fewer rows": lambda x: x[:-1],
    "dtype": lambda x: x.view(torch.bfloat16),
    "itemsize": lambda x: x.view(torch.int8),
    "address": lambda x: x.clone(),
}


@pytest.mark.parametrize("size", [70, 30])
@pytest.mark.parametrize("change", GEOMETRIES)
def test_geometry_is_seen(device: str, change: str, size: int) -> None:
    # Equal everywhere: the content of a transposed matrix is the same.
    tensor = torch.nn.Parameter(torch.full((size, size), 3, device=device).half(), False)
    hashed = ContentHash([tensor])
    before = hashed()
    original = tensor.data
    tensor.data = GEOMETRIES[change](original)
    assert hashed() != before
    changed = hashed()
    # What is there now is read.
    bits(tensor.data)[-1] ^= 1
    assert hashed() != changed
    bits(tensor.data)[-1] ^= 1
    tensor.data = original
    assert hashed() == before


@pytest.mark.parametrize("first", [0, 40])
def test_memory_given_back_is_not_read(device: str, first: int) -> None:
    tensor = random(torch.float32, device).clone()[first:].detach()
    hashed = ContentHash([tensor, torch.ones(3, device=device)])
    before = hashed()
    tensor.untyped_storage().resize_(0)
    assert hashed() != before


def test_order_is_seen(device: str) -> None:
    one, other = (random(torch.float32, device)[k : k + 5200].clone().view(130, 40) for k in (0, 9))
    hashed = ContentHash([one, other])
    before = hashed()
    for left, right in ((one, other), (one[5], one[6]), (one[5], other[5])):
        kept = left.clone()
        left.copy_(right)
        right.copy_(kept)
        assert hashed() != before
        right.copy_(left)
        left.copy_(kept)
    # One row of bits can be copied to both sides.
    assert ContentHash([other, one])() != before


@pytest.mark.parametrize("value", [-0.0, float("nan")])
def test_bits_are_compared(device: str, value: float) -> None:
    tensor = torch.zeros(200, 64, device=device)
    hashed = ContentHash([tensor])
    before = hashed()
    tensor.fill_(value)
    assert hashed() != before
    before = hashed()
    bits(tensor).bitwise_xor_(1)
    assert hashed() != before


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    number = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(number)


def test_equal_content_is_equal(device: str, threads: Callable[[int], None]) -> None:
    data = random(torch.float32, device)
    tensors = [make(data) for make in (*MATRICES.values(), *SMALL.values())]
    tensors += [data[:0], data[:0].view(3, 0)]
    if ContentHash(tensors)._compiled:
        # Enough rows for several threads.
        tensors.append(torch.arange(400_000).view(-1, 16))
    hashed = ContentHash(tensors)
    expected = hashed()
    for number in (1, 2, 3):
        threads(number)
        assert ContentHash(tensors)() == expected
    assert {hashed() for _ in range(1000 if hashed._compiled else 2)} == {expected}


def test_nothing_to_read(device: str) -> None:
    assert ContentHash([])() == ContentHash([])()
    empty = torch.empty(3, 0, device=device)
    assert ContentHash([empty])() != ContentHash([empty.view(0, 3)])()


@pytest.mark.parametrize(
    ("tensor", "got"),
    [
        (torch.eye(3).to_sparse(), "torch.sparse_coo, torch.float32"),
        (torch.zeros(2, dtype=torch.complex128), "torch.strided, torch.complex128"),
    ],
)
def test_refusals(tensor: Tensor, got: str) -> None:
    expected = rf"tensors\[1\] must be strided, of 1, 2, 4 or 8 bytes an element, got {got}"
    with pytest.raises(TypeError, match=expected):
        ContentHash([torch.zeros(1), tensor])


def test_kernel_compiles_and_fits() -> None:
    from sbert_fast.kernels import content as kernel

    arguments = [torch.empty(0, dtype=torch.int64, device="meta")] * 2
    options = {"ROWS": kernel.ROWS, "COLUMNS": kernel.COLUMNS, "num_warps": 4}
    builds = [aot.build_of(kernel._content_kernel, arguments, options, arch) for arch in ARCHS]
    usages = aot.compile_all(builds)
    print(aot.table(builds, usages))
    aot.assert_fits(builds, usages)
