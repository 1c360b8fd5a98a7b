"""Runs into a folder where something is wrong: bad rows, bad files, bad folders, a full disk."""

from __future__ import annotations

import gzip
import json
import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from corpus_runs import contents, stored, vectors, write_input
from families import make_sentence_transformer, make_texts
from sbert_fast import FastEncoder
from sbert_fast.cli import main
from sbert_fast.errors import InputError, TokenIdError


@pytest.fixture
def cli(
    encoder: FastEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """`cli("in.txt", "-o", "out")`: encodes in a folder of its own, in small chunks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sbert_fast.cli.readers.CHUNK_TEXTS", 3)
    monkeypatch.setattr("sbert_fast.cli.corpus.load_encoder", lambda args: encoder)
    return lambda *arguments: main(["encode", *arguments, "--no-progress"])


# The good texts are "red", "sea" and "west"; between them, bad rows with their places and reasons.
BAD: dict[str, tuple[bytes, dict[int, str]]] = {
    "in.txt": (b"red\r\nsea\r\n\xff\r\nwest\r\n", {3: "UTF-8"}),
    "in.jsonl": (
        b'{"text": "red"}\n\n{"text": 3}\n{"text"\n{"text": "sea"}\n{"a": "\xff"}\n'
        b'{"a": 1}\n{"text": "a\\ud800"}\n{"text": "west"}\n',
        {3: "got int", 4: "bad JSON", 6: "UTF-8", 7: "expected a field 'text'", 8: "surrogate"},
    ),
    "in.csv": (
        b'id,text\n1,red\n2\n3,"sea"\n4,"\xff\n5,six",\n7,"\xff"\n8,west\n',
        {3: "2 values as in the header, got 1", 5: "UTF-8", 7: "UTF-8"},
    ),
    "in.tsv": (b"text\tid\nred\t1\nsea\t2\nno\nwest\t3\n", {4: "got 1"}),
}


def write_bad(name: str) -> dict[int, str]:
    """Writes the input of that name; the places and reasons of its bad rows."""
    if name != "in.parquet":
        Path(name).write_bytes(BAD[name][0])
        return BAD[name][1]
    raw = pa.array([b"red", None, b"sea", b"\xff", b"west"], pa.binary())
    texts = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    pq.write_table(pa.table({"text": texts}), name, row_group_size=3)
    return {2: "got null", 4: "UTF-8"}


@pytest.mark.parametrize("step", ["1", "99999"])
@pytest.mark.parametrize("name", [*BAD, "in.parquet"])
def test_bad_rows_are_left_out_and_listed(
    cli: Callable[..., int], encoder: FastEncoder, name: str, step: str
) -> None:
    bad = write_bad(name)
    arguments = [name, "-o", "out", "--shard-bytes", step]
    assert cli(*arguments, "--on-error", "skip") == 0
    table = stored("out")
    assert table["text"].to_pylist() == ["red", "sea", "west"]
    np.testing.assert_array_equal(vectors(table), encoder.encode(["red", "sea", "west"]))
    lines = Path("out/_errors.jsonl").read_text().splitlines()
    unit = "row" if name == "in.parquet" else "line"
    found = {(r := json.loads(line))[unit]: (r["file"], r["reason"]) for line in lines}
    assert list(found) == list(bad)
    for place, (path, reason) in found.items():
        assert path == os.path.abspath(name) and bad[place] in reason


@pytest.mark.parametrize("name", [*BAD, "in.parquet"])
def test_bad_rows_without_an_embedding_keep_their_places(
    cli: Callable[..., int], encoder: FastEncoder, name: str
) -> None:
    bad = write_bad(name)
    assert cli(name, "-o", "out", "--keep-columns", "--on-error", "null") == 0
    table = stored("out")
    texts = table["text"].to_pylist()
    assert [text for text in texts if text is not None] == ["red", "sea", "west"]
    assert texts.count(None) == len(bad) == table["embedding"].null_count
    for text, vector in zip(texts, table["embedding"].to_pylist(), strict=True):
        assert (text is None) == (vector is None)
        if text is not None:
            np.testing.assert_array_equal(np.float32(vector), encoder.encode(text))


@pytest.mark.parametrize("step", ["1", "99999"])
@pytest.mark.parametrize("name", [*BAD, "in.parquet"])
def test_a_bad_row_stops_a_run(
    cli: Callable[..., int], capsys: pytest.CaptureFixture[str], name: str, step: str
) -> None:
    place, reason = next(iter(write_bad(name).items()))
    assert cli(name, "-o", "out", "--shard-bytes", step) == 1
    (error,) = capsys.readouterr().err.splitlines()
    unit = "row" if name == "in.parquet" else "line"
    assert f"{name}: {unit} {place}: " in error and reason in error
    assert list(Path("out").glob(".*.part")) == []


def test_texts_that_the_model_refuses_are_bad_rows(
    cli: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FastEncoder(make_sentence_transformer())
    row = model.tokenizer.convert_tokens_to_ids("sea")
    model[0].auto_model.embeddings.word_embeddings.weight.data[row] = 3e38
    monkeypatch.setattr("sbert_fast.cli.corpus.load_encoder", lambda args: model)
    texts = ["red", "sea", "boat", "west", "east", "sea", "cat"]
    write_input("in.txt", texts)
    assert cli("in.txt", "-o", "out", "--on-error", "skip") == 0
    assert stored("out")["text"].to_pylist() == [text for text in texts if text != "sea"]
    lines = Path("out/_errors.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in lines] == [2, 6]
    assert cli("in.txt", "-o", "more") == 1
    assert "in.txt: line 2: " in capsys.readouterr().err


@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
def test_texts_that_are_refused_one_by_one_are_bad_rows(
    cli: Callable[..., int], monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """Errors of two kinds, of which the first hides the second, and that may name no text."""
    model = FastEncoder(make_sentence_transformer())

    def refuse(texts: list[str], **options: Any) -> NDArray[Any]:
        if "" in texts:
            raise InputError(f"inputs[{texts.index('')}] must have tokens, got none")
        if "sea" in texts:
            raise TokenIdError("no row", [texts.index("sea")] if named else [])
        return encode(texts, **options)

    encode = model.encode
    monkeypatch.setattr(model, "encode", refuse)
    monkeypatch.setattr("sbert_fast.cli.corpus.load_encoder", lambda args: model)
    write_input("in.txt", ["red", "", "sea", "", "", "", "cat", "sea", "boat"])
    assert cli("in.txt", "-o", "out", "--on-error", "skip") == 0
    assert stored("out")["text"].to_pylist() == ["red", "cat", "boat"]
    lines = Path("out/_errors.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in lines] == [2, 3, 4, 5, 6, 8]


USAGE: dict[str, list[str]] = {
    "needs a folder: -o out.npy": ["a.txt", "b.txt", "-o", "out.npy"],
    "needs a folder: -o -": ["a.txt", "b.txt"],
    "not standard input": ["a.txt", "-", "-o", "out"],
    "are parquet or npy, got jsonl": ["a.txt", "-o", "out/", "--output-format", "jsonl"],
    "--limit goes with": ["a.txt", "-o", "out", "--limit", "3"],
    "contradict": ["a.txt", "-o", "out", "--resume", "--overwrite"],
    "needs --ranges": ["a.txt", "-o", "out", "--precision", "int8"],
    "goes with --precision": ["a.txt", "-o", "out", "--ranges", "a.npy"],
    "--keep-columns needs": ["a", "b", "-o", "out", "--keep-columns", "--output-format", "npy"],
    "no nulls": ["a", "b", "-o", "out", "--on-error", "null", "--output-format", "npy"],
}


@pytest.mark.parametrize("part", USAGE)
def test_wrong_usage(
    cli: Callable[..., int], capsys: pytest.CaptureFixture[str], part: str
) -> None:
    assert cli(*USAGE[part]) == 2
    assert part in capsys.readouterr().err.splitlines()[-1]
    assert os.listdir() == []


def _folder_of(name: str) -> None:
    Path("out").mkdir()
    Path("out", name).touch()


REFUSED: dict[str, tuple[Callable[[], object], list[str]]] = {
    "absent.txt: expected a regular file": (lambda: None, ["absent.txt"]),
    "x*: expected files with one of": (lambda: None, ["x*", "a.txt"]),
    "in.doc: expected one of .txt": (lambda: Path("in.doc").touch(), ["in.doc", "a.txt"]),
    "in.parquet.gz: expected one of": (lambda: Path("in.parquet.gz").touch(), ["in.parquet.gz"]),
    "./a.txt is among the inputs twice": (lambda: None, ["a.txt", "./a.txt"]),
    "must be empty or hold an earlier run, got 'mine'": (lambda: _folder_of("mine"), ["a.txt"]),
    "out must be apart from the inputs": (lambda: _folder_of("b.txt"), ["a.txt", "out/b.txt"]),
    "apart from the inputs, got out": (lambda: _folder_of("b.txt"), ["a.txt", "out"]),
    "apart from the inputs, got out/*.txt": (lambda: _folder_of("b.txt"), ["a.txt", "out/*.txt"]),
    "expected one column 'text', got 'id'": (
        lambda: Path("in.csv").write_text("id\n1\n"),
        ["in.csv"],
    ),
    "in.parquet: expected a Parquet file": (
        lambda: Path("in.parquet").write_text("PAR"),
        ["in.parquet"],
    ),
    "--keep-columns needs the same columns": (
        lambda: [Path(f"{n}.csv").write_text(f"text,{n}\nred,1\n") for n in "xy"],
        ["x.csv", "y.csv", "--keep-columns"],
    ),
    "--keep-columns needs files of one format": (
        lambda: Path("x.csv").write_text("text\nred\n"),
        ["x.csv", "a.txt", "--keep-columns"],
    ),
    "needs names that differ": (
        lambda: Path("x.csv").write_text("id,id,text\n1,2,red\n"),
        ["x.csv", "--keep-columns"],
    ),
}


@pytest.mark.parametrize("part", REFUSED)
def test_refusals_come_before_the_model_and_leave_nothing(
    cli: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    part: str,
) -> None:
    monkeypatch.setattr("sbert_fast.cli.corpus.load_encoder", lambda args: pytest.fail("loaded"))
    make, arguments = REFUSED[part]
    Path("a.txt").write_text("red\n")
    make()
    before = sorted(os.walk("."))
    assert cli(*arguments, "-o", "out") == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert part in error
    assert sorted(os.walk(".")) == before


@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_compressed_files_that_are_cut_off_stop_a_run(
    cli: Callable[..., int], capsys: pytest.CaptureFixture[str], compression: str
) -> None:
    name = f"in.txt.{compression}"
    write_input(name, make_texts(3000))
    Path(name).write_bytes(Path(name).read_bytes()[:-20])
    assert cli(name, "-o", "out", "--on-error", "skip") == 1
    assert f"{name}: bad or incomplete" in capsys.readouterr().err
    assert list(Path("out").glob("*part*")) == []
    with gzip.open("good.txt.gz", "wb") as stream:
        stream.write(b"red\n")
    Path("good.txt.gz").write_bytes(2 * Path("good.txt.gz").read_bytes())
    assert cli("good.txt.gz", "-o", "good") == 0
    assert stored("good")["text"].to_pylist() == ["red", "red"]


@pytest.mark.parametrize("output_format", ["parquet", "npy"])
def test_a_full_disk_leaves_finished_files_alone(
    cli: Callable[..., int], capfd: pytest.CaptureFixture[str], output_format: str
) -> None:
    # The second file has the longer rows, so that its output is the first not to fit.
    write_input("a.txt", ["red"] * 20)
    write_input("b.txt", make_texts(60))
    run = ["a.txt", "b.txt", "--output-format", output_format, "-o"]
    assert cli(*run, "whole/") == 0
    expected = contents("whole")
    sizes = [len(expected[f"part-0000{n}.{output_format}"]) for n in range(2)]
    # A file that may not grow fails as one on a full disk does, with another number.
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    capfd.readouterr()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (sum(sizes) // 2, limits[1]))
        assert cli(*run, "out/") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert capfd.readouterr().err == "sbert-fast: error: out: File too large\n"
    left = contents("out")
    assert f"part-00000.{output_format}" in left and len(left) == 3, sorted(left)
    assert left[f"part-00000.{output_format}"] == expected[f"part-00000.{output_format}"]
    assert cli(*run, "out/", "--resume") == 0
    assert contents("out") == expected


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may look into; those of pytest are private."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_a_folder_that_cannot_be_written_is_named(
    cli: Callable[..., int], capsys: pytest.CaptureFixture[str], open_folder: Path
) -> None:
    write_input(str(open_folder / "in.txt"), ["red"])
    (open_folder / "in.txt").chmod(0o644)
    (open_folder / "out").mkdir(mode=0o555)
    open_folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may write anywhere
    try:
        for name, what in (("out", "out/.lock"), ("new", "new"), ("in.txt/x", "in.txt/x")):
            output = str(open_folder / name)
            assert cli(str(open_folder / "in.txt"), "-o", output) == 1
            error = capsys.readouterr().err
            assert f"error: {open_folder / what}: " in error
            assert ("Permission denied" in error) == (name != "in.txt/x")
    finally:
        if user == 0:
            os.seteuid(user)
