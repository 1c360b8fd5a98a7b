"""Which calls `auto` gives to a CUDA kernel that its table lists: those the kernel takes.

The kernels are the emulated ones, so that what `auto` passes over is what the C++ ops refuse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import cuda_emulation
import families
from op_cases import int32
from refusal_cases import HEADS, public_arguments
from sbert_fast import FastEncoder, explain, linears, ops
from sbert_fast.engine import PackedEncoder
from sbert_fast.errors import ImplementationError
from sbert_fast.ops import choices, extension, limits, schemas
from sbert_fast.testing import worst_cosine

DTYPE = torch.bfloat16
PUBLIC = ("varlen_attention", "embed_norm", "add_norm", "bias_gelu", "segment_pool", "norm_pool")
# Everything of a call that is in the dtype of the activations.
ACTIVATIONS = ("qkv", "x", "residual", "word", "position_table", "type_table")
Change = Callable[[dict[str, Any]], None]
every_op = pytest.mark.parametrize("op", PUBLIC)


@pytest.fixture(autouse=True)
def listed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The CUDA ops, which take CPU tensors here, and the set of those that the table lists."""
    if (reason := cuda_emulation.unavailable()) is not None:
        pytest.skip(reason)
    monkeypatch.delenv("SBERT_FAST_IMPL", raising=False)
    cuda_emulation.load()
    library = extension.load_emulated_cuda(cuda_emulation.library())
    monkeypatch.setattr(extension, "CUDA", library)
    listed = set(schemas.SCHEMAS) - schemas.CPU_ONLY
    monkeypatch.setattr(choices, "prefers_cuda", lambda op, *_: op in listed)
    ops.reset_launches()
    return listed


def call(op: str, change: Change | None = None, dtype: torch.dtype = DTYPE) -> dict[str, Any]:
    """Arguments of the public `op` that its CUDA kernel takes, but for the `change`."""
    args = public_arguments(op)
    args |= {name: args[name].to(dtype) for name in ACTIVATIONS if name in args}
    for name in args.keys() & {"rotary", "out_dtype"}:
        args[name] = dtype if name == "out_dtype" else None
    if change is not None:
        change(args)
    return args


def ran(op: str, args: dict[str, Any], impl: str = "auto") -> str:
    """The implementation that a call of the public `op` ran on."""
    ops.reset_launches()
    getattr(ops, op)(**args, impl=impl)
    ((_, implementation),) = ops.launches()
    return implementation


def shifted(tensor: Tensor, by: int = 1) -> Tensor:
    """The same values, `by` elements behind an aligned address."""
    room = torch.empty(tensor.numel() + by, dtype=tensor.dtype)
    return room[by:].view(tensor.shape).copy_(tensor)


def shift(*names: str, by: int = 1) -> Change:
    return lambda args: args.update({name: shifted(args[name], by) for name in names})


def widen(columns: int) -> Change:
    """Rows of so many columns."""

    def change(args: dict[str, Any]) -> None:
        for name, value in args.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                args[name] = torch.ones(*value.shape[:-1], columns, dtype=value.dtype)

    return change


def head_dim(dim: int) -> Change:
    return lambda args: args.update(qkv=torch.rand(16, 3, HEADS, dim).to(DTYPE))


def rotate(args: dict[str, Any]) -> None:
    args["rotary"] = public_arguments("varlen_attention")["rotary"]


def space(columns: int, *, rows: int | None = None) -> Change:
    """Rows of x so many columns apart."""

    def change(args: dict[str, Any]) -> None:
        x = args["x"][:rows]
        args["x"] = torch.empty(x.shape[0], columns, dtype=DTYPE)[:, : x.shape[1]].copy_(x)
        if rows is not None:
            args |= {"cu_seqlens": int32(0, 1), "spans": None, "out_rows": int32(1)}

    return change


REFUSED = [
    *(("varlen_attention", change) for change in (head_dim(12), rotate, shift("qkv"))),
    *(("embed_norm", shift(name, by=3)) for name in ("word", "position_table", "type_table")),
    *(("embed_norm", shift(name)) for name in ("weight", "bias")),
    ("segment_pool", space(100)),
    *(("bias_gelu", shift(name)) for name in ("x", "bias")),
    ("segment_pool", shift("x", by=4)),
    *(
        (op, shift(name, by=2))
        for op in ("add_norm", "norm_pool")
        for name in ("x", "bias", "residual", "weight", "ln_bias")
    ),
    *((op, widen(100)) for op in PUBLIC[1:]),
    *((op, widen(4104)) for op in PUBLIC[1:] if op != "bias_gelu"),
]
TAKEN = [
    *((op, None) for op in PUBLIC),
    ("varlen_attention", head_dim(8)),
    ("varlen_attention", shift("bias", "cu_seqlens", "tiles")),
    ("embed_norm", shift("ids", "positions", "types")),
    ("embed_norm", lambda args: args.update(type_table=None, types=None)),
    ("embed_norm", lambda args: args.update({n: args[n].float() for n in ACTIVATIONS[3:]})),
    ("add_norm", lambda args: args.update(bias=None, residual=None)),
    ("add_norm", lambda args: args.update(weight=nn.Parameter(args["weight"], False))),
    ("add_norm", widen(4096)),
    ("bias_gelu", widen(4104)),
    ("segment_pool", space(104)),
    ("segment_pool", space(100, rows=1)),
    ("segment_pool", lambda args: args.update(out=None, out_rows=None)),
    ("segment_pool", shift("out", "out_rows", "spans", "cu_seqlens")),
    ("norm_pool", lambda args: args.update(out=None, out_rows=None, spans=None)),
]


@pytest.mark.parametrize(("op", "change"), TAKEN)
def test_what_a_kernel_takes(op: str, change: Change | None) -> None:
    assert ran(op, call(op, change)) == "cuda"


@pytest.mark.parametrize(("op", "change"), REFUSED)
def test_what_a_kernel_refuses(op: str, change: Change) -> None:
    """The same call: passed over by `auto`, refused where the kernel is asked for by name."""
    with pytest.raises((RuntimeError, ImplementationError)):
        ran(op, call(op, change), "cuda")
    assert ran(op, call(op, change)) != "cuda"


@every_op
def test_float32_is_passed_over(op: str) -> None:
    assert ran(op, call(op, dtype=torch.float32)) != "cuda"


@every_op
def test_what_is_not_listed_is_left_alone(op: str, listed: set[str]) -> None:
    listed.clear()
    assert ran(op, call(op)) != "cuda"


@every_op
def test_sizes_that_are_not_known_are_passed_over(op: str) -> None:
    assert ops.bind(op, torch.device("cpu"), DTYPE).implementation != "cuda"


def test_every_row_that_a_kernel_counts_is_an_int32() -> None:
    assert limits.refusal_of_size("bias_gelu", width=2**31 - 8) is None
    assert limits.refusal_of_size("bias_gelu", width=2**31) is not None
    x = torch.empty(1, 8, dtype=DTYPE).expand(2**31, 8)
    assert not limits.takes("bias_gelu", (x, None, False))
    assert limits.takes("bias_gelu", (x[1:], None, False))


class TestCapture:
    """A graph meets other tensors than those it was captured with."""

    @pytest.fixture
    def args(self) -> dict[str, Any]:
        return call("bias_gelu")

    def overloads(self, graph: torch.fx.Graph) -> set[str]:
        names = {str(node.target) for node in graph.nodes if node.op == "call_function"}
        return {name for name in names if name.startswith("sbert_fast.")}

    @every_op
    def test_compile(self, op: str) -> None:
        found: set[str] = set()

        def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
            found.update(self.overloads(module.graph))
            return module

        args = call(op)
        torch._dynamo.reset()
        torch.compile(getattr(ops, op), backend=backend, fullgraph=True)(**args)
        assert len(found) == 1 and not found.pop().endswith(".cuda")
        assert ran(op, args) == "cuda"

    @pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
    def test_export(self, args: dict[str, Any], strict: bool) -> None:
        class Module(nn.Module):
            def forward(self, x: Tensor, bias: Tensor) -> Tensor:
                return ops.bias_gelu(x, bias)

        inputs = args["x"], args["bias"]
        shapes = {"x": {0: torch.export.Dim("T", min=2)}, "bias": None}
        program = torch.export.export(Module(), inputs, dynamic_shapes=shapes, strict=strict)
        (found,) = self.overloads(program.graph)
        assert not found.endswith(".cuda")

    @pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
    def test_make_fx(self, args: dict[str, Any], mode: str) -> None:
        capture = make_fx(lambda x, bias: ops.bias_gelu(x, bias), tracing_mode=mode)
        graph = capture(args["x"], args["bias"]).graph
        (found,) = self.overloads(graph)
        assert not found.endswith(".cuda")

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
    def test_jit_trace(self, args: dict[str, Any]) -> None:
        torch.jit.trace(ops.bias_gelu, (args["x"], args["bias"]), check_trace=False)
        assert ops.launches().keys() == {("bias_gelu", "cpu")}

    def test_fake_tensors(self, args: dict[str, Any]) -> None:
        with FakeTensorMode() as mode:
            x, bias = mode.from_tensor(args["x"]), mode.from_tensor(args["bias"])
            assert ran("bias_gelu", {"x": x, "bias": bias}) != "cuda"

    def test_vmap(self, args: dict[str, Any]) -> None:
        stacked = torch.stack([args["x"], -args["x"]])
        result = torch.vmap(lambda x: ops.bias_gelu(x, args["bias"]))(stacked)
        assert ops.launches().keys() == {("bias_gelu", "cpu")}
        assert torch.equal(result[1], ops.bias_gelu(-args["x"], args["bias"], impl="cpu"))


class TestEngine:
    """Kernels are bound by sizes: the engine's own tensors lie as any kernel needs them."""

    @pytest.fixture(autouse=True)
    def _linears_of_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(linears, "KINDS", (linears.TorchLinear,))

    ONE = ("embed_norm", "varlen_attention", "bias_gelu", "add_norm", "norm_pool_out")

    @pytest.mark.parametrize("op", [*ONE, "segment_pool_out", "all"])
    def test_one_op_beside_others(self, listed: set[str], op: str) -> None:
        """Parameters begin anywhere, as those of a mapped file do."""
        if op != "all":
            listed &= {op}
        pooling = ("mean", "max") if op == "segment_pool_out" else "mean"
        st = families.make_sentence_transformer("electra-projection", pooling=pooling)
        for parameter in st.parameters():
            parameter.data = shifted(parameter.data)
        texts = ["one", "two words", "a few words more"]
        expected = FastEncoder(st, impl="reference").encode(texts)
        ops.reset_launches()
        got = FastEncoder(st, dtype=DTYPE).encode(texts)
        assert worst_cosine(got, expected) > 1 - 1e-3
        on_cuda = {name for name, implementation in ops.launches() if implementation == "cuda"}
        assert on_cuda == ({*self.ONE} if op == "all" else {op})

    def test_a_size_that_one_kernel_does_not_take(self) -> None:
        model = families.make_model("electra-projection", embedding_size=36)
        engine = PackedEncoder(model, dtype=DTYPE)
        assert engine.bind("embed_norm").implementation != "cuda"
        assert engine.prepared().embed.implementation != "cuda"
        layer = engine.prepared().stack.layers[0]
        assert layer.attention.kernel.implementation == "cuda"
        assert layer.feed_forward.down.kernel("add_norm").implementation == "cuda"
        assert layer.feed_forward.up.kernel("bias_gelu").implementation == "cuda"
        assert engine.prepared().pooling.norm_pool is not None

    def test_a_width_no_kernel_of_rows_takes(self) -> None:
        model = families.make_model("bert", hidden_size=36, num_attention_heads=3)
        engine = PackedEncoder(model, dtype=DTYPE)
        assert engine.prepared().pooling.norm_pool is None
        assert {engine.bind(op).implementation for op in ("add_norm", "varlen_attention")} == {
            engine.implementation
        }
        assert engine.bind("bias_gelu").implementation == "cuda"

    def test_a_model_tells_of_the_size(self, monkeypatch: pytest.MonkeyPatch) -> None:
        st = families.make_sentence_transformer(
            "electra-projection", overrides={"embedding_size": 36}
        )
        encoder = FastEncoder(st, dtype=DTYPE)
        monkeypatch.setattr(PackedEncoder, "device", torch.device("cuda", 0))
        monkeypatch.setattr("sbert_fast.ops.dispatch.refusal", lambda *_: None)
        monkeypatch.setattr(ops, "refusal", lambda *_: None)
        told = explain(encoder)
        assert "add_norm: cuda, by sbert_fast/ops/choices.py" in told
        assert "embed_norm: not cuda: its width E must be a multiple of 8, at most 4096" in told
        assert "got 36" in told
