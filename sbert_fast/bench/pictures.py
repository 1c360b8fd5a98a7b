"""Pictures of results: throughput by length, with the linear layers alone as the limit; latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from sbert_fast.bench.names import ALONE, OURS, PEERS  # noqa: E402
from sbert_fast.bench.tables import Document  # noqa: E402

# A system has the same color in every picture.
_COLORS = {name: f"C{number}" for number, name in enumerate((OURS, *PEERS))} | {ALONE: "gray"}
_WIDTH, _HEIGHT = 4.5, 3.2  # inches, of one part of a picture
# Text stays text, and the same results give the same file.
_SETTINGS: Any = {"svg.fonttype": "none", "svg.hashsalt": "sbert-fast", "font.size": 9}

# Tokens of a text, and tokens a second.
Point = tuple[float, float]


def throughput(
    rates: Mapping[str, Mapping[str, Sequence[Point]]],
    limits: Mapping[str, float],
    title: str,
    path: Path,
) -> Path:
    """Draw tokens a second over the length of texts, a part for each precision.

    Args:
        rates: by precision and system, its points.
        limits: by precision, tokens a second of the linear layers alone.
        title: of the picture.
        path: of the SVG file.

    Returns:
        `path`.
    """
    with plt.rc_context(_SETTINGS):
        figure, parts = _figure(len(rates), title)
        for axes, (precision, systems) in zip(parts, rates.items(), strict=True):
            for name, points in systems.items():
                lengths, speeds = zip(*sorted(points), strict=True)
                axes.plot(lengths, speeds, marker="o", color=_COLORS[name], label=name)
            if precision in limits:
                limit = limits[precision]
                axes.axhline(limit, color="gray", linestyle="--", label=ALONE)
            axes.set(title=precision, xlabel="tokens of a text", ylabel="tokens/s", ylim=(0, None))
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:.0f}")
            axes.legend(fontsize="small")
        return _save(figure, path)


def latency(found: Mapping[str, Any], title: str, path: Path) -> Path:
    """Draw milliseconds of single calls by percentile, a part for each precision.

    Args:
        found: what :func:`measure.latency` found.
        title: of the picture.
        path: of the SVG file.

    Returns:
        `path`.
    """
    precisions = list(dict.fromkeys(row["precision"] for row in found["rows"]))
    with plt.rc_context(_SETTINGS):
        figure, parts = _figure(len(precisions), title)
        for axes, precision in zip(parts, precisions, strict=True):
            for row in found["rows"]:
                if row["precision"] == precision:
                    color = _COLORS[row["system"]]
                    axes.plot(
                        found["percentiles"],
                        row["percentiles_ms"],
                        marker="o",
                        color=color,
                        label=row["system"],
                    )
            what = f"ms, one text of {found['tokens']} tokens"
            axes.set(title=precision, xlabel="percentile", ylabel=what, ylim=(0, None))
            axes.legend(fontsize="small")
        return _save(figure, path)


def draw(document: Document, folder: Path) -> list[Path]:
    """The pictures of a run, written to `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{document['model']['name']}, {document['device']['name']}"
    found = document["by_length"]
    rates: dict[str, dict[str, list[Point]]] = {}
    for row in found["rows"]:
        points = list(zip(found["lengths"], row["tokens_per_s"], strict=True))
        rates.setdefault(row["precision"], {})[row["system"]] = points
    limits = document["linear_layers_alone"]
    return [
        throughput(rates, limits, title, folder / "throughput.svg"),
        latency(document["latency"], title, folder / "latency.svg"),
    ]


def _figure(parts: int, title: str) -> tuple[Any, Any]:
    size = (_WIDTH * parts, _HEIGHT)
    figure, axes = plt.subplots(1, parts, figsize=size, squeeze=False, layout="constrained")
    figure.suptitle(title)
    return figure, axes[0]


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path
