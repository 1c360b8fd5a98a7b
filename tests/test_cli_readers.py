"""Rows out of files: which bytes end a row, which are skipped, and where chunks are cut."""

from __future__ import annotations

import io
import itertools
import re
import tracemalloc

import pytest

from sbert_fast.cli import readers, rows

# Where str.splitlines() cuts, and a line does not end.
NO_ENDS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1e"


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b"a\nb", ["a", "b"]),
        (b"a\n\n", ["a", ""]),
        (b"\n", [""]),
        (b"\xef\xbb\xbfa\r\nb\r\n", ["a", "b"]),
        (b"\xef\xbb\xbf\n", [""]),
        (b"\xef\xbb\xbf", []),
        (b"one\rtwo\rthree", ["one", "two", "three"]),
        (b"\xef\xbb\xbfa\rb\r", ["a", "b"]),
        (b"\xef\xbb\xbf\r", [""]),
        (b"a\rb\nc\r\nd\r\re", ["a", "b", "c", "d", "", "e"]),
        (f"{NO_ENDS}\r{NO_ENDS}\n".encode(), [NO_ENDS, NO_ENDS]),
    ],
)
def test_lines_of_text_files(content: bytes, texts: list[str]) -> None:
    reader = readers.TxtReader(io.BytesIO(content), "in.txt", "text")
    assert [row.text for row in reader] == texts


@pytest.mark.parametrize(
    ("kind", "content", "numbers"),
    [
        (readers.JsonlReader, b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "b"}', [1, 4]),
        (readers.JsonlReader, b"\xef\xbb\xbf", []),
        (readers.CsvReader, b'\xef\xbb\xbfid,text\n1,a\n\n2,"b"', [2, 4]),
        (readers.CsvReader, b"\xef\xbb\xbf", []),
        (readers.JsonlReader, b'\xef\xbb\xbf{"text": "a"}\r\r \r{"text": "b"}\r', [1, 4]),
        (readers.JsonlReader, b'{"text": "a"}\r\n\r\n{"text": "b"}', [1, 3]),
        (readers.CsvReader, b'\xef\xbb\xbfid,text\r1,a\r\r2,"b"', [2, 4]),
        (readers.CsvReader, b'"i\rd",text\r\n1,a\r2,b\n', [3, 4]),
    ],
)
def test_blank_lines_and_marks_of_tables(
    kind: type[readers.Reader], content: bytes, numbers: list[int]
) -> None:
    rows = list(kind(io.BytesIO(content), "in", "text"))
    assert [row.text for row in rows] == ["a", "b"][: len(numbers)]
    assert [row.number for row in rows] == numbers


def test_chunks_are_cut_by_bytes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", 10)
    reader = readers.TxtReader(io.BytesIO(b"12345678\n1\n2\n123456789012345\n3\n"), "in", "text")
    chunks = [[row.text for row in rows] for rows in readers.read_chunks(reader)]
    assert chunks == [["12345678", "1"], ["2", "123456789012345"], ["3"]]


@pytest.mark.parametrize("size", [1, 2, 3, 1 << 16])
def test_lines_end_alike_wherever_a_read_stops(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(readers, "_BLOCK_BYTES", size)
    for length in range(7):
        for content in map("".join, itertools.product("é\r\n\x85", repeat=length)):
            reader = readers.TxtReader(io.BytesIO(content.encode()), "in.txt", "text")
            expected = re.split("\r\n|\r|\n", content)
            assert [row.text for row in reader] == expected[: None if expected[-1] else -1]
            assert reader.bytes_read == len(content.encode())


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        (readers.TxtReader, b"ok\rab\xff\r", "line 2: expected UTF-8, got .* 0xff at byte 3 "),
        (readers.JsonlReader, b'{"text": "ok"}\r[1]\r', "line 2: expected a JSON object, got a "),
        (readers.CsvReader, b"id,text\r1,a\r2\r", "line 3: expected 2 values"),
    ],
)
def test_errors_count_every_kind_of_line(
    kind: type[readers.Reader], content: bytes, message: str
) -> None:
    with pytest.raises(rows.RowError, match=message):
        list(kind(io.BytesIO(content), "in", "text"))


def test_quoted_line_ends_are_text() -> None:
    content = b'text\r"a\rb"\r"c\r\nd"\r"e\nf"\r'
    reader = readers.CsvReader(io.BytesIO(content), "in.csv", "text")
    assert [row.text for row in reader] == ["a\rb", "c\r\nd", "e\nf"]


@pytest.mark.parametrize("end", [b"\r", b"\n", b"\r\n"])
def test_lines_are_read_one_by_one(end: bytes) -> None:
    stream = io.BytesIO((b"a" * 1000 + end) * 8192)
    tracemalloc.start()
    try:
        assert sum(1 for _ in readers.TxtReader(stream, "in.txt", "text")) == 8192
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
