"""Runs over corpora that are killed at random, and workers that die.

`SBERT_FAST_KILLS=100:50000` kills a hundred times, over so many rows.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from corpus_runs import contents, stored, write_input
from families import make_texts
from sbert_fast import FastEncoder
from sbert_fast.cli import main
from sbert_fast.corpus.folder import Folder

KILLS, ROWS = map(int, os.environ.get("SBERT_FAST_KILLS", "20:10000").split(":"))
COMMAND = [sys.executable, "-P", "-m", "sbert_fast"]


@pytest.mark.slow
def test_kills_at_random(
    encoder: FastEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sbert_fast.cli.corpus.load_encoder", lambda args: encoder)
    texts = make_texts(ROWS, max_words=6)
    write_input("in.txt", texts[: ROWS // 2])
    write_input("in.jsonl", texts[ROWS // 2 :], extra=True)
    step = str(sum(os.path.getsize(name) for name in ("in.txt", "in.jsonl")) // 200)
    options = ["in.txt", "in.jsonl", "--resume", "--no-progress", "--shard-bytes", step]
    started = time.monotonic()
    assert main(["encode", *options, "-o", "whole"]) == 0
    # Long enough that most runs finish some shards before they die, and few come to their end.
    longest = 3 * (time.monotonic() - started) / max(KILLS, 20)
    expected = contents("whole")
    chance = random.Random(0)
    kills = folders = 0
    while kills < KILLS:
        child = os.fork()
        if child == 0:
            try:
                code = main(["encode", *options, "-o", f"out{folders}"])
            finally:
                os._exit(code)
        time.sleep(chance.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            kills += 1
        else:
            folders += 1
    for folder in range(folders + 1):
        assert main(["encode", *options, "-o", f"out{folder}"]) == 0
        assert contents(f"out{folder}") == expected
    assert stored("out0")["text"].to_pylist() == texts
    print(f"{kills} kills, {folders + 1} folders")


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: str) -> list[str]:
    """A corpus, and the arguments to embed it with a model that every process loads for itself."""
    monkeypatch.chdir(tmp_path)
    write_input("in.csv", make_texts(3000, max_words=6))
    return ["encode", "in.csv", "--model", saved, "--shard-bytes", "3000", "--no-progress"]


@pytest.mark.slow
def test_a_worker_that_dies_is_named_and_workers_write_the_same_bytes(
    in_folder: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [*in_folder, "--threads", "1"]
    assert main([*run, "-o", "whole"]) == 0
    add = Folder.add

    def kill_one(self: Folder, *arguments: Any) -> None:
        add(self, *arguments)
        monkeypatch.setattr(Folder, "add", add)
        children = multiprocessing.active_children()
        assert len(children) == 2
        os.kill(children[0].pid or 0, signal.SIGKILL)

    monkeypatch.setattr(Folder, "add", kill_one)
    capsys.readouterr()
    assert main([*run, "-o", "out", "--workers", "2"]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    # Where: in a shard, or still loading the model, while the other was done with its first.
    assert "was killed by SIGKILL " in error and "--resume goes on with the rest" in error
    assert multiprocessing.active_children() == [] and Path("out/_journal.jsonl").is_file()
    assert list(Path("out").glob(".*.part")) == []
    assert main([*run, "-o", "out", "--workers", "2", "--resume"]) == 0
    assert contents("out") == contents("whole")


@pytest.mark.slow
def test_workers_end_with_their_parent(in_folder: list[str]) -> None:
    run = [*in_folder, "--threads", "1"]
    assert main([*run, "-o", "whole"]) == 0
    command = [*COMMAND, *run, "-o", "out", "--workers", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        while not list(Path("out").glob("part-*")):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        # Workers have the pipe, too: it ends when the last of them does.
        assert process.stderr is not None
        process.stderr.read()
    assert main([*run, "-o", "out", "--resume"]) == 0
    assert contents("out") == contents("whole")


@pytest.mark.slow
def test_what_stops_a_worker_is_told(
    in_folder: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with open("in.csv", "a") as stream:
        stream.write("1,2,3\n")
    assert main([*in_folder, "-o", "out", "--workers", "2", "--shard-bytes", "999999"]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert "in.csv: line 3002: expected 2 values as in the header, got 3" in error
