"""All that needs a GPU, in one command: build, tests, benchmarks; what is known is kept at once.

    make gpu-check OUT=results-tmp/gpu [STAGE=build,ops,models,kernels,encode] [MODEL=folder]
    make gpu-check OUT=results-tmp/gpu STAGE=build,sanitize
    make gpu-check OUT=results-tmp/gpu STAGE=kernels KERNELS="attention and cold and fp16"

Runs with the `python3` that has torch, in the source tree, without network. A stage is a list of
commands, each with a share of the time: what one leaves, the next may use, and where stages are
chosen all shares grow. One that fails or is cut short does not stop the next. The exit code is 0
where all that was asked for has passed.

Files in OUT, appended to: log.txt (what every command printed), stages.jsonl, ops.jsonl,
encode.jsonl, ground.jsonl (what was measured), and summary.txt, written after each stage.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

from benchmarks import ROOT
from benchmarks.common import results, tree
from benchmarks.common.arguments import plain_parser
from benchmarks.common.folders import minilm
from benchmarks.common.text import markdown
from benchmarks.report import TABLES
from tools.gpu.sanitize import TOOLS

WIDE_MODEL = tree.SCRATCH / "all-MiniLM-L6-v2"
# Seconds between asking a command to end and ending it.
GRACE = 8
MOST_SECONDS = 530
# A command that takes longer than so many times its share hangs.
MOST_SHARES = 4
# What every other stage needs on a fresh machine.
PREPARE = "prepare"


@dataclass
class Step:
    """A command: its name, its words, its seconds, whether its failure counts, and what is set in
    its environment."""

    name: str
    command: list[str]
    cap: float
    must: bool = True
    sets: dict[str, str] = field(default_factory=dict)


@dataclass
class Stage:
    """Commands that belong together."""

    steps: list[Step]
    default: bool = True

    @property
    def cap(self) -> float:
        """The seconds of all of them."""
        return sum(step.cap for step in self.steps)


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


def _python(module: str, *arguments: str | Path | int) -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def _pytest(files: Sequence[str], *arguments: str) -> list[str]:
    plugin = ("-p", "no:cacheprovider", "-p", "tools.gpu.fail_at_once")
    # -P: the folder kernels of the source tree is not to be found by its name.
    command = [sys.executable, "-P", "-m", "pytest", *plugin, "-q", "--tb=short", "-rfE"]
    return [*command, *arguments, *files]


def _gpu_tests() -> tuple[list[str], list[str]]:
    """Files with tests for a GPU: those of the ops, and those of models.

    Found by their text: importing the others may need packages that are not there.
    """
    marked = re.compile(r"mark\.gpu\b|\btriton_device\b")
    found = sorted(p for p in (ROOT / "tests").rglob("test_*.py") if marked.search(p.read_text()))
    models = [str(p) for p in found if "PackedEncoder" in p.read_text()]
    return [str(p) for p in found if str(p) not in models], models


# The kinds of op tests and their seconds: a process of their own for kernels that may lose it the
# device, the others first. The last takes the files that are of no kind.
_OP_KINDS = (
    ("Triton", r"test_triton_.*", 48),
    ("CUDA, rows and pooling", r"test_cuda_(?!attention).*", 20),
    ("CUDA, attention", r"test_cuda_attention.*", 22),
    ("all", r".*", 15),
)


def _op_steps(files: Sequence[str]) -> list[Step]:
    """A step for each kind of which there are files; pytest without files would run everything."""
    parallel = []
    if find_spec("xdist"):
        # Most of the time goes into compiling kernels, a process each.
        workers = max(1, min(12, (os.cpu_count() or 1) - 2))
        parallel = ["-n", str(workers), "--dist", "worksteal"]
    if find_spec("pytest_timeout"):
        # A kernel that hangs cannot be interrupted: its process is ended.
        parallel += ["--timeout=40", "--timeout-method=thread"]
    # Tests poison memory in torch's deterministic mode, which refuses matrix products without the
    # second.
    sets = {"OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    steps, left = [], list(files)
    for name, kind, cap in _OP_KINDS:
        chosen = [file for file in left if re.fullmatch(kind, Path(file).stem)]
        left = [file for file in left if file not in chosen]
        if chosen:
            steps.append(Step(name, _pytest(chosen, "-m", "gpu", *parallel), cap, sets=sets))
    return steps


def stages(out: Path, model: str | None) -> dict[str, Stage]:
    """What there is to do, in order of value.

    Args:
        out: folder of the results.
        model: folder of MiniLM, weights in any precision; None where there is none.
    """
    op_tests, model_tests = _gpu_tests()
    has_model = ["--model", str(WIDE_MODEL)] if model else []
    found = "import torch; assert torch.cuda.is_available(), 'torch finds no GPU';"
    found += "import sbert_fast.kernels, sbert_fast.ops; print(sbert_fast.ops.explain_ops())"
    build = [
        Step("machine", ["nvidia-smi"], 10, must=False),
        Step("import", [sys.executable, "-P", "-c", found], 30),
        # Triton needs none of these: the planner is faster with them, and the CUDA ops are there.
        # Where they can be built, a failure counts: tests of what is not there are skipped.
        Step("native libraries", _python("tools.gpu.build"), 50, must=bool(shutil.which("nvcc"))),
    ]
    widen = _python("benchmarks.common.models", "widen", str(model), WIDE_MODEL)
    ground = _python("benchmarks.ops.ground", "--rows", out / "ground.jsonl", *has_model)
    # FlexAttention is compiled for each shape, which takes longer than all the rest.
    flex = Step("flex", _op_rows(out, "flex and short-64"), 23, must=False)
    steps: dict[str, list[Step]] = {
        PREPARE: [Step("model in float32", widen, 15)] if model else [],
        "build": build,
        "ops": _op_steps(op_tests),
        "models": [Step("tests", _pytest(model_tests, "-m", "gpu"), 70)] if model_tests else [],
        "kernels": [
            Step("attention", _op_rows(out, "attention"), 52),
            Step("rows", _op_rows(out, "rows"), 40),
            flex,
        ],
        "encode": _encode_steps(out, model is not None),
        "sanitize": [Step(tool, _python("tools.gpu.sanitize", tool), 140) for tool in TOOLS],
        "ground": [Step("ground", ground, 240)],
    }
    only_where_asked = (PREPARE, "sanitize", "ground")
    return {name: Stage(each, name not in only_where_asked) for name, each in steps.items()}


def _op_rows(out: Path, chosen: str) -> list[str]:
    """The rows of the op benchmarks that pytest's `-k chosen` selects."""
    measured = ("--rows", str(out / "ops.jsonl"), "--benchmark-columns=median,iqr")
    folder = str(ROOT / "benchmarks" / "ops")
    return _pytest([folder], "-k", chosen, *measured, "--benchmark-disable-gc")


def _encode_steps(out: Path, has_model: bool) -> list[Step]:
    """Rows are stored after one round already."""
    minilm, halves = str(WIDE_MODEL), "bfloat16,float16"

    def step(name: str, cap: float, model: str, corpus: str, texts: int, *rest: str) -> Step:
        command = _python("benchmarks.encode", "--device", "cuda", "--model", model)
        command += ["--corpus", corpus, "--texts", str(texts)]
        command += ["--sweep-texts", str(max(400, texts // 4)), "--rows", str(out / "encode.jsonl")]
        names = ("--scope", "--dtype", "--rounds")
        command += [word for pair in zip(names, rest, strict=True) for word in pair]
        return Step(name, [*command, *(["--tokenizer", minilm] if has_model else [])], cap)

    return [
        step("MiniLM, short, s3", 40, minilm, "short", 8000, "s3", halves, "4"),
        step("MiniLM, short, s1", 30, minilm, "short", 3000, "s1", "float16", "3"),
        step("base, passages", 30, "random-base", "passages", 2000, "s3", halves, "4"),
        step("large, wiki", 35, "random-large", "wiki", 600, "s3", "bfloat16", "3"),
    ]


def environment() -> dict[str, str]:
    """What every command runs with."""
    return (
        tree.environment()
        | {
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "true",
            "SBERT_FAST_BUILD": os.environ.get("SBERT_FAST_BUILD", "auto"),
        }
        | ({"SBERT_FAST_TEST_MODEL": str(WIDE_MODEL)} if _has_model() else {})
    )


def _has_model() -> bool:
    return WIDE_MODEL.joinpath("model.safetensors").is_file()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a command and what it started, and end them if that does not."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
        if number == signal.SIGKILL:
            return
    process.wait()


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


def run(
    table: Mapping[str, Stage], names: Sequence[str], out: Path, most_seconds: float
) -> Iterator[Outcome]:
    """Run stages one after the other; an outcome is stored before it is yielded.

    A step ends when the shares of it and of all before it are over: what one leaves of its time,
    the next ones may use, and none takes that of a later one.
    """
    start = time.monotonic()
    grown = max(1.0, most_seconds / max(1.0, sum(table[name].cap for name in names)))
    shares = 0.0
    for name in names:
        for step in table[name].steps:
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
        lines = results.read(out / f"{name}.jsonl")
        rows = [line for line in lines if line.get("kind") in ("row", "error")]
        parts.append(
            TABLES[name](rows, short=True) if short and name == "ops" else TABLES[name](rows)
        )
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = plain_parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the results")
    add("--stage", default="", help="some of the stages, comma-separated")
    add("--kernels", default="", help="rows of the stage kernels, as pytest's -k selects them")
    add("--model", help="folder of MiniLM (default: SBERT_FAST_TEST_MODEL, or the package)")
    add("--seconds", type=float, default=MOST_SECONDS, help="for everything (%(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    model = Path(args.model) if args.model else minilm()
    table = stages(out, model and str(model.resolve()))
    names = [n for n in args.stage.split(",") if n] or [n for n, s in table.items() if s.default]
    if unknown := [n for n in names if n not in table]:
        print(f"no such stage: {', '.join(unknown)}; there are {', '.join(table)}", file=sys.stderr)
        return 2
    if args.kernels and "kernels" in table:
        cap = table["kernels"].cap
        table["kernels"] = Stage([Step(args.kernels, _op_rows(out, args.kernels), cap)])
    tree.write_path_hook()
    if PREPARE in table:
        names = [*([PREPARE] if not _has_model() else []), *(n for n in names if n != PREPARE)]
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # In the background of a shell it is ignored, and would be by every command.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    outcomes: list[Outcome] = []
    for outcome in run(table, names, out, args.seconds):
        outcomes.append(outcome)
        print(
            f"{outcome.stage}: {outcome.step}: {outcome.state}, {outcome.seconds:.0f} s: "
            f"{outcome.told}",
            flush=True,
        )
        (out / "summary.txt").write_text(summary(outcomes, out), encoding="utf-8")
    print("\n" + summary(outcomes, out, short=True), flush=True)
    # Native libraries may be missing: the kernels of a GPU need none.
    return int(any(o.state != "passed" for o in outcomes if o.counts))


if __name__ == "__main__":
    raise SystemExit(main())
