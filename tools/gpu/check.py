"""All that needs a GPU, in one command: build, tests, benchmarks; what is known is kept at once.

    make gpu-check OUT=results-tmp/gpu [STAGE=build,ops,models,kernels,encode] [MODEL=folder]
    make gpu-check OUT=results-tmp/gpu STAGE=kernels KERNELS="attention and cold and fp16"

Runs with the `python3` that has torch, in the source tree, without network. A stage is a list of
commands; one that fails or is cut short does not stop the next. The exit code is 0 where all that
was asked for has passed. See benchmarks/README.md.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks import ROOT
from benchmarks.common import storage, tree
from benchmarks.common.checkpoints import minilm
from benchmarks.common.options import plain_parser
from benchmarks.report import TABLES
from sbert_fast.bench.tables import markdown
from tools.gpu import stages
from tools.gpu.stages import PREPARE, Stages, Step

# Seconds between asking a command to end and ending it.
GRACE = 8
MOST_SECONDS = 530
# A command that takes longer than so many times its share hangs.
MOST_SHARES = 4


@dataclass
class Outcome:
    """What became of a step."""

    stage: str
    step: str
    returncode: int | None
    seconds: float
    timed_out: bool = False
    told: str = ""
    counts: bool = True
    failed_tests: list[str] = field(default_factory=list)

    @property
    def state(self) -> str:
        if self.timed_out:
            return "cut short"
        return "passed" if self.returncode == 0 else f"FAILED ({self.returncode})"


def _has_model() -> bool:
    return stages.WIDE_MODEL.joinpath("model.safetensors").is_file()


def environment() -> dict[str, str]:
    """What every command runs with."""
    sets = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    if _has_model():
        sets["SBERT_FAST_TEST_MODEL"] = str(stages.WIDE_MODEL)
    return tree.environment() | sets


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a command and what it started, and end what is still there."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(GRACE)


def run_step(stage: str, step: Step, cap: float, log: Path) -> Outcome:
    """Run a command for at most `cap` seconds; its output is appended to `log` as it comes."""
    start = time.monotonic()
    outcome = Outcome(stage, step.name, None, 0.0, counts=step.must)
    with log.open("ab") as stream:
        stream.write(f"\n=== {stage}: {step.name}: {' '.join(step.command)}\n".encode())
        stream.flush()
        begin = stream.tell()
        try:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env=environment() | step.sets,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            stream.write(f"{error}\n".encode())
            outcome.returncode = 127
        else:
            try:
                process.wait(cap)
            except subprocess.TimeoutExpired:
                outcome.timed_out = True
                _end(process)
            except BaseException:
                _end(process)
                raise
            outcome.returncode = process.returncode
    outcome.seconds = round(time.monotonic() - start, 2)
    with log.open("rb") as stream:
        stream.seek(begin)
        lines = stream.read().decode(errors="replace").splitlines()
    outcome.told = next((line.strip() for line in reversed(lines) if line.strip()), "")[:200]
    outcome.failed_tests = [n[:240] for n in lines if re.match(r"(FAILED|ERROR) \S", n)][:40]
    return outcome


def run(table: Stages, names: Sequence[str], out: Path, most_seconds: float) -> Iterator[Outcome]:
    """Run stages one after the other; an outcome is stored before it is yielded.

    A step ends when the shares of it and of all before it are over: what one leaves of its time,
    the next ones may use, and none takes that of a later one.
    """
    start = time.monotonic()
    total = sum(step.cap for name in names for step in table[name])
    grown = max(1.0, most_seconds / max(1.0, total))
    shares = 0.0
    for name in names:
        for step in table[name]:
            shares += step.cap * grown
            left = start + min(shares, most_seconds) - time.monotonic()
            if left <= 1:
                outcome = Outcome(name, step.name, None, 0.0, True, "no time left", step.must)
            else:
                outcome = run_step(name, step, min(MOST_SHARES * step.cap, left), out / "log.txt")
            with (out / "stages.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(asdict(outcome)) + "\n")
            yield outcome


def summary(outcomes: list[Outcome], out: Path, short: bool = False) -> str:
    """The table of stages, what failed, and what was measured."""
    table = [
        (o.stage, o.step, o.state + ("" if o.counts else " *"), f"{o.seconds:.0f}", o.told[:90])
        for o in outcomes
    ]
    parts = [markdown(("stage", "step", "state", "seconds", "last line"), table)]
    failed = [test for o in outcomes for test in o.failed_tests]
    parts.append(failed[:20] if short else failed)
    for name in ("ground", "ops", "encode"):
        lines = storage.read(out / f"{name}.jsonl")
        rows = [line for line in lines if line.get("kind") in ("row", "error")]
        options = {"short": True} if short and name == "ops" else {}
        parts.append(TABLES[name](rows, **options))
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = plain_parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the results")
    add("--stage", default="", help="some of the stages, comma-separated")
    add("--kernels", default="", help="rows of the stage kernels, as pytest's -k selects them")
    add("--model", help="folder of MiniLM (default: SBERT_FAST_TEST_MODEL, or the package)")
    add("--seconds", type=float, default=MOST_SECONDS, help="for everything (%(default)s)")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    model = Path(args.model) if args.model else minilm()
    table = stages.make_stages(out, model and str(model.resolve()))
    default = [name for name in table if name not in stages.ONLY_WHERE_ASKED]
    names = [name for name in args.stage.split(",") if name] or default
    if unknown := [n for n in names if n not in table]:
        print(f"no such stage: {', '.join(unknown)}; there are {', '.join(table)}", file=sys.stderr)
        return 2
    if args.kernels:
        cap = sum(step.cap for step in table["kernels"])
        table["kernels"] = [Step(args.kernels, stages.op_benchmarks(out, args.kernels), cap)]
    tree.write_path_hook()
    if PREPARE in table:
        names = [*([PREPARE] if not _has_model() else []), *(n for n in names if n != PREPARE)]
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # In the background of a shell it is ignored, and would be by every command.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    outcomes: list[Outcome] = []
    for o in run(table, names, out, args.seconds):
        outcomes.append(o)
        print(f"{o.stage}: {o.step}: {o.state}, {o.seconds:.0f} s: {o.told}", flush=True)
        (out / "summary.txt").write_text(summary(outcomes, out), encoding="utf-8")
    print("\n" + summary(outcomes, out, short=True), flush=True)
    # Native libraries may be missing: the kernels of a GPU need none.
    return int(any(o.state != "passed" for o in outcomes if o.counts))


if __name__ == "__main__":
    raise SystemExit(main())
