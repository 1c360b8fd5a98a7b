"""Rows out of files: which bytes end a row, which are skipped, and where chunks are cut."""

from __future__ import annotations

import io

import pytest

from sbert_fast.cli import readers


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b"a\nb", ["a", "b"]),
        (b"a\n\n", ["a", ""]),
        (b"\n", [""]),
        (b"\xef\xbb\xbfa\r\nb\r\n", ["a", "b"]),
        (b"\xef\xbb\xbf\n", [""]),
        (b"\xef\xbb\xbf", []),
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
