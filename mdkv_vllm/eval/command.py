"""``mdkv eval``: run a task set against a server, or many methods in one process."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterable
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mdkv_vllm import __version__
from mdkv_vllm.config import (
    DEFAULT_HEAD_POWER,
    DEFAULT_HEAD_SHARE,
    HEADS_FILE,
    MixedDimConfig,
)
from mdkv_vllm.core.formats import PageGeometry
from mdkv_vllm.core.losses import LOSSES, POOL_AFTER, POOL_BEFORE
from mdkv_vllm.eval.report import markdown, plots
from mdkv_vllm.eval.rows import Row, append_rows, read_rows
from mdkv_vllm.tasks import TASKS, generate
from mdkv_vllm.tasks.example import Example
from mdkv_vllm.tasks.published import load_published
from mdkv_vllm.tasks.text import Haystack, load_text, reference_prose, token_counter

QUICK_TASKS = ("needle_digits", "long_answer")
DEFAULT_BUDGETS = (0.5, 0.27, 0.25, 0.125, 0.0625)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``mdkv eval``."""
    parser.add_argument(
        "model", help="folder or hub name of the model (its tokenizer with --server)"
    )
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--offline", action="store_true", help="compare methods in this process")
    mode.add_argument("--server", metavar="URL", help="ask an OpenAI-compatible server")
    parser.add_argument("--name", help="what to call the server in the report (default: server)")
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD",
        help="offline methods (default: all); ours with other settings: ours:NAME=VALUE,...",
    )  # fmt: skip
    parser.add_argument(
        "--budgets",
        nargs="+",
        type=float,
        metavar="SHARE",
        help="shares of the prompt's bytes (default offline: "
        f"{' '.join(map(str, DEFAULT_BUDGETS))}; with --server: what the server does)",
    )
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="default: all")
    parser.add_argument(
        "--published", nargs="+", type=Path, default=[], metavar="FILE",
        help="BABILong, RULER or LongBench files (jsonl) instead of generated tasks",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, help="examples of each published file at most")
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[1024, 2048], metavar="TOKENS",
        help="prompt lengths (default: 1024 2048)",
    )  # fmt: skip
    parser.add_argument(
        "--per-task", type=int, default=10,
        help="examples per task and length (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--haystack", nargs="+", type=Path, default=[], metavar="FILE",
        help="text files or folders to hide things in (default: Python's language reference)",
    )  # fmt: skip
    parser.add_argument("--split", choices=["choose", "report"], help="only this half")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16", help="compute type (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="minutes: two tasks, short prompts")
    parser.add_argument(
        "--out", type=Path, default=Path("results/eval"),
        help="folder for rows.jsonl, report.md and plots; rows already there are kept and not "
        "measured again (default: %(default)s)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure what is missing, then write the report."""
    console = Console(stderr=True)
    if options.quick:
        options.tasks = options.tasks or list(QUICK_TASKS)
        options.lengths, options.per_task = [512], 2
        options.budgets = options.budgets or [0.5, 0.25]
    for budget in options.budgets or []:
        if not 0 < budget <= 1:
            raise ValueError(f"--budgets: {budget} is out of range; allowed are 0 to 1")
    path = options.out / "rows.jsonl"
    rows = read_rows(path)
    prepare = _offline if options.offline else _server
    tokenizer, measure = prepare(options)
    text = load_text(options.haystack) if options.haystack else reference_prose()
    check_same_run(options.out, run_description(options, text))
    work = [
        (example, turn)
        for example in _examples(options, text, tokenizer)
        for turn in range(len(example.turns))
        if options.split in (None, example.split)
    ]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("measuring", total=len(work))
        for example, turn in work:
            progress.update(bar, description=f"{example.task} {example.length}")
            done = {row.key for row in rows if row.example == example.key and row.turn == turn}
            new = list(measure(example, turn, done))
            append_rows(path, new)
            rows += new
            progress.advance(bar)
    keys = {(example.key, turn) for example, turn in work}
    report(
        [row for row in rows if (row.example, row.turn) in keys], options.out, Console(), console
    )


def run_description(options: argparse.Namespace, haystack: str) -> dict[str, Any]:
    """All that rows of one folder must share to be compared."""
    return {
        "version": __version__,
        "model": str(options.model),
        "dtype": options.dtype,
        "seed": options.seed,
        "examples per task": options.per_task,
        "haystack": hashlib.sha256(haystack.encode()).hexdigest()[:16],
        "settings": repr(MixedDimConfig()),
        "formats": list(MixedDimConfig().format_set(PageGeometry(16, 64, torch.bfloat16)).names),
        "head budgets": [DEFAULT_HEAD_SHARE, DEFAULT_HEAD_POWER],
        "head scores": _digest(Path(options.model) / HEADS_FILE) if options.offline else None,
        "losses": [repr(LOSSES), POOL_BEFORE, POOL_AFTER],
    }


def _digest(path: Path) -> str | None:
    """A short digest of a file; None where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None


def check_same_run(folder: Path, description: dict[str, Any]) -> None:
    """Note what a folder's rows were measured with, or check that it is the same.

    Raises:
        ValueError: the folder holds rows of another run.
    """
    path = folder / "run.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(description, indent=1))
        return
    before = json.loads(path.read_text())
    for name, value in description.items():
        if before.get(name) != value:
            raise ValueError(
                f"--out: {folder} holds rows measured with {name} {before.get(name)!r}, not "
                f"{value!r}; name another folder"
            )


def report(rows: list[Row], folder: Path, out: Console, console: Console) -> None:
    """Print the report and write it beside the rows.

    Raises:
        ValueError: there is nothing to report.
    """
    if not rows:
        raise ValueError("nothing was measured: no example is left after --split and --limit")
    text = markdown(rows)
    (folder / "report.md").write_text(text)
    drawn = plots(rows, folder)
    out.print(text, soft_wrap=True, markup=False, highlight=False)
    console.print(f"written: {folder / 'report.md'}, {', '.join(map(str, drawn))}")


Measure = Callable[[Example, int, set[tuple[str, int, str, float]]], Iterable[Row]]
"""Example, turn and the keys already measured to the rows still missing."""


def _offline(options: argparse.Namespace) -> tuple[Any, Measure]:
    from mdkv_vllm.eval.methods import NEED_HEAD_SCORES, methods_for
    from mdkv_vllm.eval.methods.eviction import ChannelPruning, Eviction, require_kvpress
    from mdkv_vllm.eval.methods.ours import MixedDim
    from mdkv_vllm.eval.offline import measure, trials
    from mdkv_vllm.models.in_process import InProcessModel

    if options.dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype is {options.dtype!r}; allowed are float32, bfloat16, float16")
    model = InProcessModel(options.model, getattr(torch, options.dtype), options.device)
    known = methods_for(model)
    for name in options.methods or []:
        if name.startswith("ours:"):
            known[name] = MixedDim.parse(name)
        if name not in known:
            raise ValueError(f"--methods: {name!r} is unknown; allowed are {', '.join(known)}")
    chosen = options.methods or list(known)
    if not options.methods and not (model.folder / HEADS_FILE).is_file():
        chosen = [name for name in known if name not in NEED_HEAD_SCORES]
        Console(stderr=True).print(
            f"left out: {', '.join(NEED_HEAD_SCORES)}, which need {model.folder / HEADS_FILE}; "
            "make it with 'mdkv head-scores' (of a model in a folder)",
            soft_wrap=True,
        )
    # Everything else is compared with full attention.
    names = dict.fromkeys(("full", *chosen))
    if any(isinstance(known[name], (Eviction, ChannelPruning)) for name in names):
        require_kvpress()
    wanted = trials([known[name] for name in names], options.budgets or DEFAULT_BUDGETS)

    def missing(
        example: Example, turn: int, done: set[tuple[str, int, str, float]]
    ) -> Iterable[Row]:
        left = [
            trial
            for trial in wanted
            if (example.key, turn, trial.method.name, round(trial.budget, 6)) not in done
        ]
        return measure(model, example, turn, left) if left else []

    return model.tokenizer, missing


def _server(options: argparse.Namespace) -> tuple[Any, Measure]:
    from transformers import AutoTokenizer

    from mdkv_vllm.eval.server import Server

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    server = Server(options.server, options.name or "server", tokenizer)
    _ = server.model  # unreachable servers are found before any work is done
    budgets: list[float | None] = list(options.budgets or [None])

    def missing(
        example: Example, turn: int, done: set[tuple[str, int, str, float]]
    ) -> Iterable[Row]:
        for budget in budgets:
            share = 1.0 if budget is None else budget
            if (example.key, turn, server.name, round(share, 6)) not in done:
                yield server.measure(example, turn, budget)

    return tokenizer, missing


def _examples(options: argparse.Namespace, text: str, tokenizer: Any) -> list[Example]:  # noqa: ANN401
    """Examples, one of each task and length in turn: a run cut short is balanced."""
    count = token_counter(tokenizer)
    if options.published:
        files = [load_published(path, count)[: options.limit] for path in options.published]
        return [e for group in zip_longest(*files) for e in group if e is not None]
    haystack = Haystack(text, count)
    tasks = options.tasks or list(TASKS)
    lists = [
        list(generate([task], [length], options.per_task, haystack, options.seed))
        for task in tasks
        for length in options.lengths
    ]
    return [e for e in chain.from_iterable(zip_longest(*lists)) if e is not None]
