"""`sbert-fast encode` into a folder: every row once and in order, wherever inputs are cut."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corpus_runs import LINES, TEXTS, contents, stored, vectors, write_input
from families import make_texts
from sbert_fast import FastEncoder
from sbert_fast.cli import main
from sbert_fast.corpus.columns import load_columns
from sbert_fast.corpus.inputs import cut, describe
from sbert_fast.corpus.reading import ShardReader

NAMES = [f"in.{kind}" for kind in ("txt", "jsonl", "csv", "tsv", "parquet")]
NAMES += ["in.txt.gz", "in.csv.zst", "in.jsonl.zst"]


@pytest.fixture
def cli(
    encoder: FastEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """`cli("in.txt", "-o", "out")`: encodes in a folder of its own, in small chunks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sbert_fast.cli.readers.CHUNK_TEXTS", 4)
    monkeypatch.setattr("sbert_fast.cli.corpus.load_encoder", lambda args: encoder)
    return lambda *arguments: main(["encode", *arguments, "--no-progress"])


@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_embedded_once_and_in_order(
    cli: Callable[..., int], encoder: FastEncoder, name: str
) -> None:
    texts = 3 * (LINES if ".txt" in name else TEXTS)
    write_input(name, texts)
    assert cli(name, "-o", "out", "--shard-bytes", "64") == 0
    assert (len(list(Path("out").glob("part-*"))) > 2) == (Path(name).suffix not in (".gz", ".zst"))
    table = stored("out")
    assert table.column_names == ["text", "embedding"]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 64)
    assert table["text"].to_pylist() == texts
    np.testing.assert_array_equal(vectors(table), encoder.encode(texts))
    assert pq.read_table("out").equals(table), "readers of datasets see the parts alone"


def test_folders_and_patterns_stand_for_their_files(
    cli: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["data/b.txt", "data/a.jsonl", "data/sub/c.csv", "data/_d.txt", "data/x/.e/f.txt"]
    for name in [*names, "data/README.md", "late.txt"]:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        write_input(name if name[-2:] != "md" else f"{name}.txt", [name])
    os.rename("data/README.md.txt", "data/README.md")
    assert cli("late.txt", "data", "-o", "out") == 0
    expected = ["late.txt", "data/a.jsonl", "data/b.txt", "data/sub/c.csv"]
    assert stored("out")["text"].to_pylist() == expected
    assert "1 files with other extensions are left out" in capsys.readouterr().err
    assert cli("data/**/*[bc].*", "-o", "more") == 0
    assert stored("more")["text"].to_pylist() == ["data/b.txt", "data/sub/c.csv"]


@pytest.mark.parametrize("inputs", [".", "**/*.[jp]*"])
def test_what_lies_in_the_output_folder_is_no_input_of_what_is_around_it(
    cli: Callable[..., int], inputs: str
) -> None:
    Path("sub").mkdir()
    write_input("sub/in.jsonl", TEXTS)
    assert cli(inputs, "-o", "sub/out") == 0
    expected = contents("sub/out")
    for option in ("--resume", "--overwrite"):
        assert cli(inputs, "-o", "sub/out", option) == 0
        assert contents("sub/out") == expected


CONTENTS = {
    "txt": b"\xef\xbb\xbfa\r\nbb\rccc\n\n\r\n\re\nlast",
    "jsonl": b'{"text": "a"}\r\n\n{"text": "b"}\r{"text": "c"}',
    "csv": b'\xef\xbb\xbfid,text\r\n1,"a\nb"\r\n\n2,"c""\r\nd,"\n3,e',
    "tsv": b'text\tid\n"a\tb"\t1\n\n"c\n\n"\t2\n"d"\t3',
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_rows_are_whole_wherever_a_file_is_cut(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"in.{kind}"
    path.write_bytes(CONTENTS[kind])
    file = describe(str(path), kind, None)
    columns = load_columns([file], "text", False, None)

    def read(step: int) -> list[tuple[str | None, int]]:
        shards = cut([file], "text", step)
        assert [s.end for s in shards[:-1]] == [s.start for s in shards[1:]]
        assert shards[0].start == 0 and shards[-1].end == file.size
        found = []
        for shard in shards:
            reader = ShardReader(file, shard, "text", columns)
            for chunk in reader:
                found += zip(chunk.texts, map(reader.place, chunk.numbers), strict=True)
        return found

    whole = read(1 << 20)
    assert len(whole) > 2 and None not in dict(whole)
    assert len(cut([file], "text", 1)) > 2
    for step in range(1, file.size + 1):
        assert read(step) == whole


def test_large_blocks_are_cut_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "in.txt"
    path.write_bytes(b"ab\r\ncd\re\n" * 3)
    file = describe(str(path), "txt", None)
    expected = [cut([file], "text", step) for step in range(1, 12)]
    monkeypatch.setattr("sbert_fast.corpus.inputs._BLOCK_BYTES", 1)
    assert [cut([file], "text", step) for step in range(1, 12)] == expected


@pytest.mark.parametrize("name", ["in.csv", "in.jsonl", "in.parquet", "in.tsv.gz"])
def test_all_columns_are_kept(cli: Callable[..., int], name: str) -> None:
    write_input(name, TEXTS, extra=True)
    assert cli(name, "-o", "out", "--keep-columns", "--shard-bytes", "64") == 0
    table = stored("out")
    assert table.column_names == ["id", "text", "embedding"]
    assert [int(value) for value in table["id"].to_pylist()] == list(range(len(TEXTS)))
    assert table["text"].to_pylist() == TEXTS
    assert str(table.schema.field("id").type) == ("string" if "sv" in name else "int64")


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_columns_go_by_their_names_whatever_their_order(cli: Callable[..., int], kind: str) -> None:
    orders = [["id", "text"], ["text", "id"], ["embedding", "text", "id"]]
    for number, order in enumerate(orders):
        row = [f"{name} {number}" for name in order]
        if kind == "parquet":
            pq.write_table(pa.table(dict(zip(order, zip(row), strict=True))), f"{number}.{kind}")
            continue
        separator = "," if kind == "csv" else "\t"
        lines = [order, row, row]
        Path(f"{number}.{kind}").write_text("\n".join(separator.join(line) for line in lines))
    assert cli(f"?.{kind}", "-o", "out", "--keep-columns", "--shard-bytes", "20") == 0
    table = stored("out")
    assert table.column_names == ["id", "text", "embedding"]
    for name in ("id", "text"):
        assert table[name].unique().to_pylist() == [f"{name} {number}" for number in range(3)]


def test_fields_of_objects_have_one_type_in_all_files(cli: Callable[..., int]) -> None:
    rows = [
        {"n": 1, "x": 1, "big": 1 << 53, "mixed": 1, "deep": {"é": [1]}, "embedding": 0},
        {"n": None, "x": 0.5, "big": (1 << 53) + 1, "flag": True, "odd": "\ud800", "none": None},
        {"huge": 1 << 64, "big": 0.5, "mixed": "a"},
    ]
    for number, row in enumerate(rows):
        Path(f"{number}.jsonl").write_text(json.dumps(row | {"text": "red"}) + "\n")
    assert cli("?.jsonl", "-o", "out", "--keep-columns") == 0
    table = stored("out")
    types = {field.name: str(field.type) for field in table.schema}
    assert types.pop("embedding").startswith("fixed_size_list<")
    assert {name: kind for name, kind in types.items() if kind != "string"} == {
        "n": "int64",
        "x": "double",
        "flag": "bool",
    }
    found = {name: [v for v in table[name].to_pylist() if v is not None] for name in types}
    assert found["x"] == [1.0, 0.5] and found["flag"] == [True] and found["none"] == []
    assert found["deep"] == ['{"é": [1]}'] and found["odd"] == ['"\\ud800"']
    assert found["big"] == [str(1 << 53), str((1 << 53) + 1), "0.5"]
    assert found["mixed"] == ["1", '"a"'] and found["huge"] == [str(1 << 64)]


def test_columns_keep_their_types(cli: Callable[..., int]) -> None:
    table = pa.table(
        {
            "day": pa.array([0, None], pa.date32()),
            "words": pa.array([["a"], []], pa.list_(pa.string())),
            "text": pa.array(["red", "sea"]).dictionary_encode(),
            "embedding": [1, 2],
        }
    )
    pq.write_table(table, "in.parquet")
    assert cli("in.parquet", "-o", "out", "--keep-columns") == 0
    assert stored("out").drop_columns("embedding").equals(table.drop_columns("embedding"))


@pytest.mark.parametrize("precision", ["float32", "float16", "ubinary"])
def test_arrays(cli: Callable[..., int], encoder: FastEncoder, precision: str) -> None:
    texts = make_texts(30)
    write_input("in.txt", texts)
    options = ["--output-format", "npy", "--precision", precision, "--shard-bytes", "500"]
    assert cli("in.txt", "-o", "out/", "--normalize", *options) == 0
    parts = [np.load(path) for path in sorted(Path("out").glob("part-*.npy"))]
    kind = "float32" if precision == "float16" else precision
    expected = encoder.encode(texts, normalize_embeddings=True, precision=kind)
    assert len(parts) > 2
    expected = expected.astype(np.float16) if precision == "float16" else expected
    np.testing.assert_array_equal(np.concatenate(parts), expected)


@pytest.mark.parametrize(
    "name", ["in.txt", "in.csv", "in.parquet", "in.txt.gz", "in.csv.gz", "in.txt.zst"]
)
@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_an_empty_file_has_a_part_without_rows(
    cli: Callable[..., int], name: str, kind: str
) -> None:
    if name == "in.parquet":
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), name)
    else:
        Path(name).touch()
    assert cli(name, "-o", "out/", "--output-format", kind) == 0
    (part,) = Path("out").glob(f"part-*.{kind}")
    assert (np.load(part) if kind == "npy" else vectors(pq.read_table(part))).shape == (0, 64)
