"""Where the CUDA ops are tested: thread by thread on a CPU, and on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import cuda_emulation
from attention_cases import assert_same_bits
from sbert_fast.ops import extension

# Calls an op by its name; the result is on the host.
Run = Callable[[str, Sequence[Any]], Tensor]

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

ROOM = 1 << 14  # numbers; of any dtype, a multiple of 16 bytes
BUSY_CYCLES = 20_000_000  # about ten milliseconds


def enter(request: pytest.FixtureRequest) -> Iterator[str]:
    """The body of a fixture whose parameters are "cuda", and orders of the emulator's threads.

    It yields the device of the tensors; outputs hold NaN before a kernel runs.
    """
    if request.param == "cuda":
        if (reason := extension.cuda_refusal(torch.device("cuda"))) is not None:
            pytest.skip(reason)
        request.getfixturevalue("poisoned")
        assert torch.empty_strided((8,), (1,), device="cuda").isnan().all()
        torch.manual_seed(0)
        yield "cuda"
        return
    request.getfixturevalue("poisoned_memory")
    torch.manual_seed(0)
    cuda_emulation.load()
    cuda_emulation.set_order(request.param)
    yield "cpu"
    cuda_emulation.set_order(0)


def there(args: Sequence[Any], device: str) -> list[Any]:
    """`args` with their tensors on `device`; those that are there already, as they are."""
    return [a.to(device) if isinstance(a, Tensor) else a for a in args]


def runner(place: str) -> Run:
    def run(op: str, args: Sequence[Any]) -> Tensor:
        return getattr(torch.ops.sbert_fast, op).cuda(*there(args, place)).cpu()

    return run


def roomy(value: Any, place: str) -> Any:
    """A tensor copied to where zeros lie in front of it and behind it; anything else as it is.

    For calls that are to be refused: a kernel that ran all the same would stay inside of memory.
    """
    if not isinstance(value, Tensor):
        return value
    memory = torch.zeros(2 * ROOM + value.numel(), dtype=value.dtype, device=place)
    copy = memory[ROOM : ROOM + value.numel()].view(value.shape)
    return copy.copy_(value)


def needs_memory(gib: int) -> None:
    """Skip the test on a GPU that has less."""
    total = torch.cuda.get_device_properties("cuda").total_memory
    if total < gib << 30:
        pytest.skip(f"needs a GPU with {gib} GiB of memory")


def assert_streams_and_graphs(op: str, args: Sequence[Any]) -> None:
    """The op runs in its turn on the current stream, and can be captured.

    Args:
        args: on a GPU; the first one is written to.
    """
    call, (x, *others) = getattr(torch.ops.sbert_fast, op).cuda, args
    before, after = x.clone(), x.flip(-1)
    expected = call(after, *others)
    assert not torch.equal(call(x, *others), expected)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(BUSY_CYCLES)  # another stream would be done before x changes
        x.copy_(after)
        out = call(x, *others)
    torch.cuda.synchronize()
    assert_same_bits(out, expected)

    x.copy_(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(x, *others)
    x.copy_(after)
    graph.replay()
    assert_same_bits(out, expected)


def assert_devices_agree(op: str, args: Sequence[Any]) -> None:
    """The op runs on the device of its tensors, whatever the current one is."""
    call = getattr(torch.ops.sbert_fast, op).cuda
    first, second = (call(*there(args, f"cuda:{index}")).cpu() for index in (0, 1))
    assert_same_bits(first, second)
