"""The command line: every format in and out, row for row as `encode`, whole files or none."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from sentence_transformers.util import quantize_embeddings

from families import make_sentence_transformer, make_texts
from sbert_fast import FastEncoder
from sbert_fast.cli import encode, main, readers

# Fewer texts a chunk than any test has, so that every run crosses chunks.
CHUNK_TEXTS = 4
LINES = [
    "The cat sits.",
    "",
    "naïve café, 日本語",
    "a\u2028b\x85c\x0cd",
    ' "quoted", ',
    "red",
    "",
    "x",
]
TEXTS = [*LINES, "two\nlines", "a\rb"]
FORMATS = ("txt", "jsonl", "csv", "parquet")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("model"))
    make_sentence_transformer(prompts={"query": "small red boat: "}).save(path)
    return path


@pytest.fixture(scope="module")
def encoder(model: str) -> FastEncoder:
    return FastEncoder(model, device="cpu")


@pytest.fixture
def cli(
    encoder: FastEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., int]]:
    """`cli("in.txt", ...)`: encodes in a folder of its own, in small chunks, and says nothing.

    The model is loaded once for all of them; with `--model` it is loaded as a user has it.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(readers, "CHUNK_TEXTS", CHUNK_TEXTS)
    load = encode.load_encoder
    monkeypatch.setattr(encode, "load_encoder", lambda args: load(args) if args.model else encoder)
    yield lambda *arguments: main(["encode", *arguments, "--no-progress"])
    assert list(tmp_path.glob(".*")) == [], "a temporary file is left"


def write_texts(path: str, texts: list[str]) -> None:
    """An input file of the format that its extension says."""
    if path.endswith(".txt"):
        Path(path).write_bytes("".join(text + "\n" for text in texts).encode())
    elif path.endswith(".parquet"):
        pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path, row_group_size=3)
    elif path.endswith(".csv"):
        quoted = [text.replace('"', '""') for text in texts]
        rows = [f'{i},"{text}"\r\n' for i, text in enumerate(quoted)]
        Path(path).write_bytes("".join(["id,text\r\n", *rows]).encode())
    else:
        rows = [json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)]
        Path(path).write_text("".join(rows))


def read_output(path: str) -> tuple[list[str] | None, NDArray[Any]]:
    """Texts, where they are stored, and embeddings `[N, dim]`."""
    if path.endswith(".npy"):
        return None, np.load(path)
    if path.endswith(".parquet"):
        table = pq.read_table(path)
        assert table.column_names == ["text", "embedding"]
        rows = table["embedding"].combine_chunks()
        values = rows.flatten().to_numpy().reshape(len(rows), rows.type.list_size)
        return table["text"].to_pylist(), values
    records = [json.loads(line) for line in Path(path).read_text().split("\n")[:-1]]
    embeddings = np.array([record["embedding"] for record in records], dtype=np.float32)
    return [record["text"] for record in records], embeddings


def encode_chunks(encoder: FastEncoder, texts: list[str], **options: Any) -> NDArray[Any]:
    chunks = [texts[i : i + CHUNK_TEXTS] for i in range(0, len(texts), CHUNK_TEXTS)]
    return np.concatenate([encoder.encode(chunk, **options) for chunk in chunks])


@pytest.mark.parametrize("target", ["npy", "jsonl", "parquet"])
@pytest.mark.parametrize("source", FORMATS)
def test_every_format_keeps_every_row_in_order(
    cli: Callable[..., int], encoder: FastEncoder, source: str, target: str
) -> None:
    texts = LINES if source == "txt" else TEXTS
    write_texts(f"in.{source}", texts)
    assert cli(f"in.{source}", "-o", f"out.{target}") == 0
    stored, embeddings = read_output(f"out.{target}")
    assert stored in (None, texts)
    assert embeddings.dtype == np.float32
    np.testing.assert_array_equal(embeddings, encode_chunks(encoder, texts))


def test_options_reach_the_encoder(cli: Callable[..., int], model: str) -> None:
    encoder = FastEncoder(model, device="cpu", impl="reference", batch_tokens=64)
    write_texts("in.txt", LINES)
    options = ["--prompt-name", "query", "--truncate-dim", "24", "--normalize", "--limit", "5"]
    loading = ["--model", model, "--device", "cpu", "--impl", "reference", "--batch-tokens", "64"]
    assert cli("in.txt", "-o", "out.npy", *options, *loading) == 0
    expected = encode_chunks(
        encoder, LINES[:5], prompt_name="query", truncate_dim=24, normalize_embeddings=True
    )
    np.testing.assert_array_equal(np.load("out.npy"), expected)
    assert cli("in.txt", "-o", "out.npy", "--overwrite", "--prompt", "see: ", *loading) == 0
    np.testing.assert_array_equal(np.load("out.npy"), encode_chunks(encoder, LINES, prompt="see: "))


def test_json_records_keep_their_fields(cli: Callable[..., int]) -> None:
    Path("in.jsonl").write_text('{"id": 7, "body": "é", "embedding": 0, "odd": "\\ud800"}\n')
    assert cli("in.jsonl", "-o", "out.jsonl", "--field", "body") == 0
    record = json.loads(Path("out.jsonl").read_text())
    assert list(record) == ["id", "body", "odd", "embedding"]
    assert record["id"] == 7 and record["odd"] == "\ud800" and len(record["embedding"]) == 64


def test_pipes(
    cli: Callable[..., int],
    encoder: FastEncoder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = FastEncoder.encode

    def noisy(self: FastEncoder, *args: Any, **kwargs: Any) -> Any:
        print("noise of a library")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(FastEncoder, "encode", noisy)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"text\nred\nsea\n")))
    assert cli("-", "--input-format", "csv") == 0
    captured = capsys.readouterr()
    Path("out.jsonl").write_text(captured.out)
    texts, embeddings = read_output("out.jsonl")
    assert texts == ["red", "sea"]
    np.testing.assert_array_equal(embeddings, encoder.encode(["red", "sea"]))
    assert "sbert-fast: 2 texts, 6 tokens, 0 texts truncated" in captured.err.splitlines()[-1]


def test_progress_is_on_stderr(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.txt").write_text("red\ncat\n")
    assert main(["encode", str(tmp_path / "in.txt"), "--model", model, "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert "2/2" in captured.err and "texts/s" in captured.err and "tokens/s" in captured.err
    assert len(captured.out.splitlines()) == 2


@pytest.mark.parametrize("precision", ["binary", "ubinary"])
def test_bits(cli: Callable[..., int], encoder: FastEncoder, precision: str) -> None:
    write_texts("in.txt", LINES)
    assert cli("in.txt", "-o", "out.npy", "--precision", precision) == 0
    expected = encode_chunks(encoder, LINES, precision=precision)
    np.testing.assert_array_equal(np.load("out.npy"), expected)


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_scaled_integers(cli: Callable[..., int], encoder: FastEncoder, precision: str) -> None:
    texts = make_texts(3 * CHUNK_TEXTS)
    write_texts("in.txt", texts)
    assert cli("in.txt", "-o", "out.npy", "--precision", precision) == 0
    embeddings = encode_chunks(encoder, texts)
    first = embeddings[:CHUNK_TEXTS]
    ranges = np.stack([first.min(axis=0), first.max(axis=0)])
    np.testing.assert_array_equal(np.load("out.npy.ranges.npy"), ranges)
    expected = quantize_embeddings(embeddings, precision, ranges=ranges)
    assert np.load("out.npy").dtype == np.dtype(precision)
    np.testing.assert_array_equal(np.load("out.npy"), expected)

    again = ["--precision", precision, "--ranges", "out.npy.ranges.npy", "-o", "again.parquet"]
    write_texts("in.txt", texts[-5:])
    assert cli("in.txt", *again) == 0
    np.testing.assert_array_equal(read_output("again.parquet")[1], expected[-5:])
    assert not Path("again.parquet.ranges.npy").exists()


@pytest.mark.parametrize("precision", ["float32", "int8", "ubinary"])
@pytest.mark.parametrize("target", ["npy", "jsonl", "parquet"])
@pytest.mark.parametrize("source", FORMATS)
def test_empty_input(cli: Callable[..., int], source: str, target: str, precision: str) -> None:
    if source == "parquet":
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), "in.parquet")
    else:
        Path(f"in.{source}").touch()
    assert cli(f"in.{source}", "-o", f"out.{target}", "--precision", precision) == 0
    _, embeddings = read_output(f"out.{target}")
    width = {"float32": 64, "int8": 64, "ubinary": 8}[precision]
    assert embeddings.shape == ((0,) if target == "jsonl" else (0, width))


def test_output_files_are_ordinary(cli: Callable[..., int]) -> None:
    write_texts("in.txt", LINES)
    Path("real.npy").write_text("old")
    Path("link.npy").symlink_to("real.npy")
    assert cli("in.txt", "-o", "link.npy", "--overwrite") == 0
    assert Path("link.npy").is_symlink()
    mapped = np.load("link.npy", mmap_mode="r")
    assert isinstance(mapped, np.memmap) and mapped.shape == (len(LINES), 64)
    assert Path("real.npy").stat().st_mode == Path("in.txt").stat().st_mode


def test_a_closed_pipe_is_no_disaster(model: str, tmp_path: Path) -> None:
    write_texts(str(tmp_path / "in.txt"), make_texts(300, max_words=3))
    command = [sys.executable, "-P", "-m", "sbert_fast", "encode", str(tmp_path / "in.txt")]
    with subprocess.Popen(
        [*command, "--model", model, "--device", "cpu", "--no-progress"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.readline()
        assert first, process.stderr.read()
        assert json.loads(first)["text"]
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_help_and_version_import_nothing_heavy() -> None:
    script = """
import sys
from sbert_fast.cli import main
assert main(["--version"]) == main(["--help"]) == main(["encode", "--help"]) == 0
assert {"torch", "numpy", "transformers"}.isdisjoint(sys.modules)
"""
    command = [sys.executable, "-P", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "encode" in done.stdout and "doctor" in done.stdout


_PEAKS = """
import re, sys
from sbert_fast.cli import main
for source in sys.argv[1:3]:
    assert main(["encode", source, *sys.argv[3:]]) == 0
    print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["npy", "parquet"])
def test_memory_does_not_grow_with_the_file(model: str, tmp_path: Path, target: str) -> None:
    sources = [str(tmp_path / f"{count}.txt") for count in (5_000, 50_000)]
    write_texts(sources[0], make_texts(5_000, max_words=4))
    Path(sources[1]).write_text(10 * Path(sources[0]).read_text())
    options = ["-o", str(tmp_path / f"out.{target}"), "--overwrite", "--model", model]
    command = [sys.executable, "-P", "-c", _PEAKS, *sources, *options, "--device", "cpu"]
    done = subprocess.run([*command, "--no-progress"], capture_output=True, text=True, check=True)
    few, many = (int(line) / 1024 for line in done.stdout.split())
    assert many < few + 100, f"peaks in MiB: {few}, {many}"
