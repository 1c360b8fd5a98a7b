"""Standard streams that are closed, full or deserted: one line, an exit code, no half result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sbert_fast.cli import main, readers, streams

# The command as a process has it, with little to import. A library writes to descriptor 2.
SCRIPT = """
import os, sys
from contextlib import suppress
from types import ModuleType, SimpleNamespace

util = ModuleType("sentence_transformers.util")
util.quantize_embeddings = lambda embeddings, precision, ranges: embeddings
sys.modules |= {"sentence_transformers": ModuleType("sentence_transformers"), util.__name__: util}

import numpy as np
from sbert_fast.cli import doctor, encode, main

class Encoder:
    stats = SimpleNamespace(texts=0, tokens=0, truncated=0)

    def encode(self, texts, **options):
        print("noise")
        with suppress(OSError):
            os.write(2, b"noise\\n")
        return np.array([[len(text)] * 8 for text in texts], dtype=np.float32)

encode.load_encoder = lambda args: Encoder()
doctor.examine = lambda: {"versions": {"path": "/h\\xe9/\\udcff"}}
raise SystemExit(main())
"""
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """`run("encode in.txt", ">&-")`: in a process of its own, in a folder with three texts."""
    (tmp_path / "in.txt").write_text("a\nbb\nccc\n")

    def run(
        arguments: str,
        redirection: str = "",
        stdout: int = subprocess.PIPE,
        before: str = "",
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        environment = {"PYTHONUNBUFFERED": "", "PYTHONIOENCODING": "utf-8"} | environment
        shell = f'{before} exec "$0" -P -c "$1" {arguments} {redirection}'
        return subprocess.run(
            ["sh", "-c", shell, sys.executable, SCRIPT],
            cwd=tmp_path,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            encoding=environment["PYTHONIOENCODING"],
        )

    return run


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line != "noise"]


FULL = "standard output: No space left on device"
BAD = "Bad file descriptor"


@pytest.mark.parametrize(
    ("arguments", "redirection", "error"),
    [
        ("encode - -o out.npy", "<&-", "standard input is closed"),
        ("encode - --input-format csv", "<&-", "standard input is closed"),
        ("encode - -o out.npy", "<&- >&-", "standard input is closed"),
        ("encode in.txt", ">&-", "standard output is closed"),
        ("encode - < in.txt", ">&-", "standard output is closed"),
        ("doctor", ">&-", "standard output is closed"),
        ("doctor --json", "<&- >&-", "standard output is closed"),
        ("encode in.txt --no-progress", ">/dev/full", FULL),
        ("doctor", ">/dev/full", FULL),
        ("doctor --json", ">/dev/full", FULL),
        ("encode in.txt --no-progress", "1</dev/null", f"standard output: {BAD}"),
        ("doctor", "1</dev/null", f"standard output: {BAD}"),
        ("encode - -o out.npy", "0>/dev/null", f"standard input: {BAD}"),
        ("encode /dev/stdin --input-format txt -o out.npy", "<&-", "/dev/stdin: Is a directory"),
        ("encode in.txt -o /dev/stdout --output-format npy", ">&-", "/dev/stdout: expected a "),
        ("encode in.txt -o /dev/fd/9 --output-format npy", "9>&-", "/fd/"),
    ],
)
def test_streams_that_are_needed(run: Run, arguments: str, redirection: str, error: str) -> None:
    done = run(arguments, redirection)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = said(done)
    assert line.startswith("sbert-fast: error: ") and error in line


@pytest.mark.parametrize(
    "redirection",
    ["<&-", ">&-", "2>&-", "<&- >&-", ">&- 2>&-", "<in.txt 2>&-", "<&- >&- 2>&-", ">/dev/full"],
)
def test_streams_that_are_not_needed(run: Run, tmp_path: Path, redirection: str) -> None:
    source = "-" if "<in" in redirection else "in.txt"
    done = run(f"encode {source} -o out.npy", redirection)
    assert done.returncode == 0 and done.stdout == ""
    assert (tmp_path / "out.npy").stat().st_size == 128 + 3 * 8 * 4
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), [[1] * 8, [2] * 8, [3] * 8])


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", ["encode long.txt --no-progress", "encode - < long.txt"])
def test_half_a_line_is_a_failure(
    run: Run, tmp_path: Path, arguments: str, unbuffered: str
) -> None:
    (tmp_path / "long.txt").write_text("x" * 3000)
    done = run(arguments, ">out", before="ulimit -f 1;", PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 1
    assert "error: standard output: File too large" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("redirection", ["2>&-", "<&- 2>&-"])
def test_nothing_joins_the_output_where_stderr_is_closed(run: Run, redirection: str) -> None:
    done = run("encode in.txt", redirection)
    assert done.returncode == 0
    assert [json.loads(line)["text"] for line in done.stdout.splitlines()] == ["a", "bb", "ccc"]


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
@pytest.mark.parametrize(
    ("arguments", "code"), [("encode absent.txt", 1), ("encode in.doc", 2), ("--wrong", 2)]
)
def test_a_failure_that_cannot_be_told(
    run: Run, arguments: str, code: int, redirection: str
) -> None:
    done = run(arguments, redirection)
    assert (done.returncode, done.stdout) == (code, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", ["encode in.txt --no-progress", "doctor"])
def test_an_output_without_a_reader_ends_quietly(run: Run, arguments: str, unbuffered: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = run(arguments, stdout=writing, PYTHONUNBUFFERED=unbuffered)
    finally:
        os.close(writing)
    assert done.returncode == 1 and said(done) == []


@pytest.mark.parametrize("arguments", ["--help", "--version", "encode --help"])
def test_help_that_cannot_be_written(run: Run, arguments: str) -> None:
    done = run(arguments, ">/dev/full")
    assert (done.returncode, done.stderr) == (1, f"sbert-fast: error: {FULL}\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_doctor_escapes_what_the_console_cannot_show(run: Run, encoding: str) -> None:
    done = run("doctor", PYTHONIOENCODING=encoding)
    letter = "\\xe9" if encoding == "ascii" else "é"
    assert (done.stdout, done.stderr) == (f"versions\n  path: /h{letter}/\\udcff\n", "")


def test_an_input_that_does_not_wait_is_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)

    def write() -> None:
        with open(writing, "wb", buffering=0) as stream:
            for text in (b"a\nb", b"b\n", b"ccc"):
                stream.write(text)
                time.sleep(0.05)

    writer = threading.Thread(target=write)
    with open(reading) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        stream = streams.standard_input()
        writer.start()
        texts = [row.text for row in readers.TxtReader(stream, "in", "text")]
    writer.join()
    assert texts == ["a", "bb", "ccc"]


@pytest.mark.parametrize("name", ["stdin", "stdout"])
def test_streams_that_the_program_closed(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = open(os.devnull)  # noqa: SIM115
    closed.close()
    monkeypatch.setattr(sys, name, closed)
    assert main(["encode", "-", "--no-progress"] if name == "stdin" else ["doctor"]) == 1
    assert capsys.readouterr().err.endswith("put is closed\n")
