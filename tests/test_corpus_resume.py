"""Runs that die and go on: the bytes of a run that did not, nothing lost, nothing twice; and what
another run, another model or a changed input meets."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from corpus_runs import contents, stored, write_input
from families import make_sentence_transformer, make_texts
from sbert_fast import FastEncoder
from sbert_fast.cli import main
from sbert_fast.corpus.folder import Finished, Folder
from sbert_fast.corpus.identity import model_digest
from sbert_fast.corpus.reading import ShardReader

TEXTS = make_texts(60, max_words=5)
RUN = ["*.jsonl", "late.txt", "-o", "out", "--shard-bytes", "900", "--on-error", "skip"]


@pytest.fixture
def cli(
    encoder: FastEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """`cli("--resume")`: a run over several shards, with one bad row."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sbert_fast.cli.readers.CHUNK_TEXTS", 8)
    monkeypatch.setattr("sbert_fast.cli.corpus.load_encoder", lambda args: encoder)
    write_input("in.jsonl", TEXTS, extra=True)
    with open("in.jsonl", "a") as stream:
        stream.write('{"text": 3}\n')
    write_input("late.txt", TEXTS[:5])
    return lambda *arguments: main(["encode", *RUN, "--no-progress", *arguments])


def in_child(action: Callable[[], Any]) -> int:
    """The exit status of `action` in a forked process; its exit code is 0 unless it raises."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = action()
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


@contextmanager
def dying(calls: int) -> Any:
    """The process kills itself before the call of this number, from 1, that reaches the disk."""
    count = 0

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal count
            count += 1
            if count == calls:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)

        return call

    names = ("fsync", "replace", "mkdir", "unlink", "open")
    originals = {name: getattr(os, name) for name in names}
    for name, function in originals.items():
        setattr(os, name, before(function))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(os, name, function)


def test_a_run_that_dies_at_every_step_ends_with_the_same_bytes(cli: Callable[..., int]) -> None:
    assert cli() == 0
    os.rename("out", "whole")
    expected = contents("whole")
    assert len([name for name in expected if name.startswith("part")]) > 3

    def one_more_step() -> int:
        with dying(step):
            return cli("--resume")

    # Every run dies at a later step than the one before; the next one goes on with what is left.
    step = deaths = 0
    while True:
        step += 1
        status = in_child(one_more_step)
        if os.waitstatus_to_exitcode(status) == 0:
            break
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        deaths += 1
    assert deaths > 10
    assert contents("out") == expected


def test_a_run_may_die_at_any_step_of_a_new_run(cli: Callable[..., int]) -> None:
    assert cli() == 0
    os.rename("out", "whole")
    expected = contents("whole")
    for step in range(1, 100, 3):

        def die(step: int = step) -> int:
            with dying(step):
                return cli()

        status = in_child(die)
        assert cli("--resume") == 0
        assert contents("out") == expected
        if os.waitstatus_to_exitcode(status) == 0:
            return
        for path in Path("out").iterdir():
            path.unlink()
    pytest.fail("no run came to its end")


def interrupted(cli: Callable[..., int]) -> None:
    """Leaves a run of which two shards are finished."""

    def die() -> int:
        with dying_after_parts(2):
            return cli()

    assert os.WIFSIGNALED(in_child(die))


@contextmanager
def dying_after_parts(parts: int) -> Iterator[None]:
    add = Folder.add

    def counted(self: Folder, temporary: Path, finished: Finished) -> None:
        add(self, temporary, finished)
        if finished.shard == parts - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    Folder.add = counted  # type: ignore[method-assign]
    try:
        yield
    finally:
        Folder.add = add  # type: ignore[method-assign]


def test_what_is_finished_is_not_read_again(
    cli: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(cli)
    before = {path.name: path.stat().st_mtime_ns for path in Path("out").glob("part-*")}
    assert len(before) == 2
    shards: list[int] = []
    monkeypatch.setattr(ShardReader, "__iter__", record(ShardReader.__iter__, shards))
    assert cli("--resume") == 0
    assert shards == list(range(2, len(list(Path("out").glob("part-*")))))
    assert before.items() <= {p.name: p.stat().st_mtime_ns for p in Path("out").iterdir()}.items()


def record(read: Callable[..., Any], shards: list[int]) -> Callable[..., Any]:
    def recording(self: ShardReader) -> Any:
        shards.append(self.shard.number)
        return read(self)

    return recording


def test_a_complete_run_is_left_alone(cli: Callable[..., int]) -> None:
    assert cli() == 0
    times = {path.name: path.stat().st_mtime_ns for path in Path("out").glob("[!.]*")}
    assert cli("--resume") == 0
    assert {path.name: path.stat().st_mtime_ns for path in Path("out").glob("[!.]*")} == times


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_damaged_files_are_written_again(
    cli: Callable[..., int], capsys: pytest.CaptureFixture[str], damage: str, complete: bool
) -> None:
    assert cli() == 0
    expected = contents("out")
    if not complete:
        os.rename("out", "whole")
        interrupted(cli)
    part = Path("out/part-00001.parquet")
    whole = part.read_bytes()
    part.write_bytes(whole[:-1] if damage == "cut" else bytes([whole[0] ^ 1]) + whole[1:])
    if damage == "missing":
        part.unlink()
    assert cli("--resume") == 0
    assert contents("out") == expected
    assert "part-00001.parquet is missing or damaged" in capsys.readouterr().err


def test_a_line_of_the_journal_may_be_cut_off(cli: Callable[..., int]) -> None:
    assert cli() == 0
    expected = contents("out")
    os.rename("out", "whole")
    interrupted(cli)
    journal = Path("out/_journal.jsonl")
    lines = journal.read_bytes()
    for length in (len(lines) - 1, len(lines) // 2, 3):
        journal.write_bytes(lines[:length])
        assert cli("--resume") == 0
        assert contents("out") == expected
        manifest = json.loads(Path("out/_manifest.json").read_text())
        del manifest["finished"]
        Path("out/_manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def _touch_input() -> None:
    Path("in.jsonl").write_text(Path("in.jsonl").read_text() + '{"text": "more"}\n')


def _swap_input() -> None:
    """The same size and time, another byte."""
    status = os.stat("in.jsonl")
    Path("in.jsonl").write_text(Path("in.jsonl").read_text().replace('"id": 1,', '"id": 7,', 1))
    os.utime("in.jsonl", ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES: dict[str, tuple[Callable[[], Any], list[str], list[str]]] = {
    "no --resume": (lambda: None, [], ["--resume goes on", "--overwrite"]),
    "longer input": (_touch_input, ["--resume"], ["in.jsonl is not what it was"]),
    "other bytes": (_swap_input, ["--resume"], ["in.jsonl is not what it was"]),
    "no input": (lambda: os.unlink("late.txt"), ["--resume"], ["late.txt"]),
    "new input": (
        lambda: write_input("new.jsonl", ["red"]),
        ["--resume"],
        ["new.jsonl is new"],
    ),
    "option": (
        lambda: None,
        ["--resume", "--normalize"],
        ["normalize_embeddings was False, is True", "other options"],
    ),
    "format": (
        lambda: None,
        ["--resume", "--on-error", "stop"],
        ["on_error was 'skip', is 'stop'"],
    ),
    "release": (
        lambda: Path("out/_manifest.json").write_text('{"version": 99}'),
        ["--resume"],
        ["version 99"],
    ),
    "no manifest": (
        lambda: Path("out/_manifest.json").write_text("{"),
        ["--resume"],
        ["_manifest.json is not the manifest of a run"],
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_runs_are_refused_and_finished_files_stay(
    cli: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: str,
) -> None:
    interrupted(cli)
    make, arguments, parts = CHANGES[change]
    make()
    before = contents("out")
    monkeypatch.setattr(
        "sbert_fast.cli.corpus.load_encoder", lambda args: pytest.fail("the model was loaded")
    )
    assert cli(*arguments) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert all(part in error for part in parts), error
    assert contents("out") == before


def test_another_model_is_refused(
    cli: Callable[..., int],
    encoder: FastEncoder,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupted(cli)
    Path("out/part-00001.parquet").write_bytes(b"damaged")
    before = contents("out")
    other = FastEncoder(make_sentence_transformer(prompts={"query": "find: "}))
    monkeypatch.setattr("sbert_fast.cli.corpus.load_encoder", lambda args: other)
    assert model_digest(other) == model_digest(encoder), "the same, made once more"
    next(iter(other.parameters())).data.view(-1)[0] += 1
    assert cli("--resume") == 1
    assert "run of another model or system: model was " in capsys.readouterr().err
    assert contents("out") == before


def test_an_earlier_run_is_replaced_when_asked(cli: Callable[..., int]) -> None:
    interrupted(cli)
    assert cli("--overwrite", "--shard-bytes", "100000") == 0
    assert len(list(Path("out").glob("part-*"))) == 2
    assert stored("out")["text"].to_pylist() == TEXTS + TEXTS[:5]


@pytest.mark.parametrize("missing", ["input", "column", "model"])
def test_an_earlier_run_stays_if_a_new_one_cannot_start(
    cli: Callable[..., int], monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    def refuse(args: Any) -> None:
        raise OSError("no model")

    interrupted(cli)
    before = contents("out")
    Path("bad.csv").write_text("id\n1\n")
    if missing == "model":
        monkeypatch.setattr("sbert_fast.cli.corpus.load_encoder", refuse)
    more = {"input": ["absent.txt"], "column": ["bad.csv"], "model": []}[missing]
    assert main(["encode", *more, *RUN, "--overwrite", "--no-progress"]) == 1
    assert contents("out") == before


def test_two_runs_on_one_folder_do_not_mix(
    cli: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(cli)
    with Folder(Path("out")):
        assert os.WEXITSTATUS(in_child(lambda: cli("--resume"))) == 1
        assert cli("--overwrite") == 1
        assert f"in use by process {os.getpid()} on " in capsys.readouterr().err
    assert cli("--resume") == 0


def test_an_input_that_changes_during_a_run_stops_it(
    cli: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards: list[int] = []
    read = record(ShardReader.__iter__, shards)

    def change(self: ShardReader) -> Any:
        if self.shard.number == 1:
            os.utime("in.jsonl", (1, 1))
        return read(self)

    monkeypatch.setattr(ShardReader, "__iter__", change)
    assert cli() == 1
    assert "in.jsonl has changed since the run began" in capsys.readouterr().err
    assert [path.name for path in Path("out").glob("part-*")] == ["part-00000.parquet"]
