"""The report of an evaluation: one Markdown table per question, and plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mdkv_vllm.eval.rows import Row
from mdkv_vllm.eval.statistics import SOLVED, Summary, solved_tasks, summarise


def markdown(rows: Sequence[Row]) -> str:
    """The whole report as Markdown.

    Args:
        rows: of one or several runs.
    """
    solved = solved_tasks(rows)
    scored = [row for row in rows if (row.task, row.length) in solved]
    texts = [row for row in rows if row.score is None]
    parts = [
        f"## Tasks that full attention solves at {SOLVED:.0%} or more",
        ", ".join(f"{task} at {length}" for task, length in sorted(solved)) or "none",
        overview(scored),
    ]
    if texts:
        parts += ["## Long answers, along full attention's own", overview(texts)]
    if given := [row for row in rows if row.quarters]:
        parts += ["## Along a given answer, by its quarters", by_quarter(given)]
    parts += ["## Accuracy by task", by_task(rows)]
    return "\n\n".join(parts) + "\n"


def overview(rows: Sequence[Row]) -> str:
    """A line per method and budget; without accuracy where no answer has a reference."""
    columns: dict[str, Callable[[Summary], str]] = {
        "method": lambda s: s.method,
        "bytes": _bytes,
        "n": lambda s: str(s.count),
        "accuracy": lambda s: _number(s.accuracy),
        "95 %": lambda s: f"{_number(s.low)} to {_number(s.high)}",
        "KL": lambda s: _number(s.divergence, 4),
        "top-1": lambda s: _number(s.agreement),
    }
    if all(row.score is None for row in rows):
        del columns["accuracy"], columns["95 %"]
    lines = [[cell(s) for cell in columns.values()] for s in _ordered(summarise(rows))]
    return _table(list(columns), lines)


def by_quarter(rows: Sequence[Row]) -> str:
    """Divergence and agreement as an answer goes on, and the bytes held at its end."""
    lines = []
    for s in _ordered(summarise(rows)):
        mine = [row for row in rows if (row.method, row.budget) == (s.method, s.budget)]
        quarters = zip(*(row.quarters for row in mine), strict=True)
        means = [[sum(v) / len(mine) for v in zip(*some, strict=True)] for some in quarters]
        end = sum(row.end_share or 0.0 for row in mine) / len(mine)
        cells = [f"{_number(kl, 4)} {_number(same)}" for kl, same in means]
        lines.append([s.method, _bytes(s), f"{end:.1%}", str(len(mine)), *cells])
    names = [f"{n} quarter: KL, top-1" for n in ("first", "second", "third", "last")]
    return _table(["method", "bytes", "at its end", "n", *names], lines)


def by_task(rows: Sequence[Row]) -> str:
    """Accuracy of every method and budget in every task."""
    tasks = sorted({(row.task, row.length) for row in rows if row.score is not None})
    columns = {
        task: {
            (s.method, s.budget): s.accuracy
            for s in summarise(row for row in rows if (row.task, row.length) == task)
        }
        for task in tasks
    }
    lines = [
        [s.method, _bytes(s)] + [_number(columns[task].get((s.method, s.budget))) for task in tasks]
        for s in _ordered(summarise(rows))
    ]
    return _table(["method", "bytes", *(f"{task} {length}" for task, length in tasks)], lines)


def _ordered(summaries: list[Summary]) -> list[Summary]:
    return sorted(summaries, key=lambda s: (-round(s.budget, 2), s.divergence or 0.0))


def _bytes(summary: Summary) -> str:
    if summary.share is None:
        return f"{summary.budget:.1%} asked"
    return f"{summary.share:.1%}"


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _table(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plots(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw quality over bytes, one line per method, and the depths at which needles are lost.

    Args:
        rows: of one or several runs.
        folder: where the SVG files go.

    Returns:
        The files written.
    """
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    # Equal rows draw equal files.
    pyplot.rcParams["svg.hashsalt"] = "mdkv"
    solved = solved_tasks(rows)
    scored = [row for row in rows if (row.task, row.length) in solved]
    texts = [row for row in rows if row.score is None] or list(rows)
    figures = {
        "accuracy.svg": _lines(pyplot, scored, "accuracy", "accuracy on solved tasks"),
        "divergence.svg": _lines(pyplot, texts, "divergence", "KL to full attention, nats"),
    }
    if needles := [row for row in rows if row.depth is not None and row.score is not None]:
        figures["depths.svg"] = _depths(pyplot, needles)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / name, metadata={"Date": None}, bbox_inches="tight")
        pyplot.close(figure)
    return [folder / name for name in figures]


def _lines(pyplot, rows: Sequence[Row], value: str, label: str):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    figure, axes = pyplot.subplots(figsize=(8, 5))
    summaries = summarise(rows)
    axes.set_prop_cycle(color=pyplot.get_cmap("tab20").colors)
    for method in dict.fromkeys(s.method for s in summaries):
        points = sorted(
            (100 * (s.budget if s.share is None else s.share), getattr(s, value))
            for s in summaries
            if s.method == method and getattr(s, value) is not None
        )
        if points:
            ours = method.startswith("ours")
            axes.plot(*zip(*points, strict=True), marker="o", label=method, lw=3 if ours else 1)
    axes.set_xscale("log")
    ticks = [6.25, 12.5, 25, 50, 100]
    axes.set_xticks(ticks, [f"{tick:g} %" for tick in ticks])
    axes.minorticks_off()
    if value == "divergence":
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.set_ylim(bottom=0)
    axes.set_xlabel("bytes kept of the 16-bit cache")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    if summaries:
        axes.legend(ncol=2, fontsize=8)
    return figure


def _depths(pyplot, rows: Sequence[Row]):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    summaries = _ordered(summarise(rows))
    depths = sorted({row.depth for row in rows if row.depth is not None})
    grid = []
    for s in summaries:
        mine = [row for row in rows if (row.method, row.budget) == (s.method, s.budget)]
        line = []
        for depth in depths:
            scores = [row.score for row in mine if row.depth == depth and row.score is not None]
            line.append(sum(scores) / len(scores) if scores else float("nan"))
        grid.append(line)
    figure, axes = pyplot.subplots(figsize=(8, 0.25 * len(grid) + 1.5))
    picture = axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_yticks(range(len(grid)), [f"{s.method} {_bytes(s)}" for s in summaries], fontsize=7)
    axes.set_xticks(range(len(depths)), [f"{depth:.2f}" for depth in depths], fontsize=7)
    axes.set_xlabel("depth of the needle in the prompt")
    figure.colorbar(picture, label="found")
    return figure
