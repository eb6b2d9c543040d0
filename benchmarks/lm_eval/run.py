"""Let EleutherAI's lm_eval put our tasks to a running server: write task files, run it.

Examples, prompts, request fields and scoring are those of ``mdkv eval --server``; asking,
collecting and averaging is lm_eval's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from mdkv_vllm.config import REQUEST_BUDGET
from mdkv_vllm.eval.server import Server
from mdkv_vllm.tasks import SEED, generate
from mdkv_vllm.tasks.example import AGREEMENT, Example
from mdkv_vllm.tasks.prompt import prompt_text
from mdkv_vllm.tasks.text import Haystack, reference_prose, token_counter

SHARED = Path(__file__).with_name("task.yaml")
TASKS = ("needle_digits", "multikey_1", "variable_tracking", "json_lookup", "followup")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the task files, then run lm_eval on them; its exit status."""
    options = _options(arguments)
    try:
        if importlib.util.find_spec("lm_eval") is None:
            raise ValueError("lm_eval is missing: pip install --no-deps -r requirements/eval.txt")
        if options.budget is not None and not 0 < options.budget <= 1:
            raise ValueError(f"--budget: {options.budget} is out of range; allowed are 0 to 1")
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        served = Server(options.server, "server", tokenizer).model
        files = write_tasks(
            tokenizer, options.tasks, options.lengths, options.per_task, options.out / "tasks"
        )
    except (ValueError, OSError) as error:
        print(f"lm_eval/run.py: {error}", file=sys.stderr)
        return 2
    command = lm_eval_command(options.server, served, files, options.budget, options.out)
    environment = {
        "LMEVAL_LOG_LEVEL": "WARNING",
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        # The loader keeps what it has read; a folder of ours is removed with the results.
        "HF_DATASETS_CACHE": str(options.out / "cache"),
    }
    return subprocess.run(command, env=environment).returncode


def write_tasks(
    tokenizer: Any,  # noqa: ANN401
    tasks: Sequence[str],
    lengths: Sequence[int],
    per_task: int,
    folder: Path,
) -> list[Path]:
    """Write examples and a task file per task and length.

    Args:
        tokenizer: of the served model; renders the prompts.
        tasks: names of tasks, out of :data:`mdkv_vllm.tasks.TASKS`.
        lengths: prompt tokens.
        per_task: examples of each task and length.
        folder: where to write; made if missing.

    Returns:
        The task files.

    Raises:
        ValueError: a task, a length or a number that cannot be had; ``long_answer``, whose
            answers are compared with another method's.
    """
    haystack = Haystack(reference_prose(), token_counter(tokenizer))
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for task in tasks:
        for length in lengths:
            examples = list(generate([task], [length], per_task, haystack, SEED))
            files.append(_write_task(tokenizer, f"mdkv_{task}_{length}", examples, folder))
    return files


def lm_eval_command(
    url: str, served: str, tasks: Sequence[Path], budget: float | None, out: Path
) -> list[str]:
    """The command that puts tasks to a server.

    Args:
        url: the server's address.
        served: name of the model it serves.
        tasks: task files.
        budget: share of prompt bytes to keep, sent with each request; None: the server's own.
        out: folder for results and answers.
    """
    # A tokenizer would be used to send token ids, cut to lm_eval's idea of the longest prompt.
    model = {
        "model": served,
        "base_url": f"{url.rstrip('/')}/v1/completions",
        "tokenizer_backend": "none",
        "timeout": 600,
    }
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions"]
    command += ["--model_args", json.dumps(model), "--tasks", ",".join(map(str, tasks))]
    command += ["--output_path", str(out), "--log_samples"]
    if budget is not None:
        command += ["--gen_kwargs", json.dumps({"vllm_xargs": {REQUEST_BUDGET: budget}})]
    return command


def _write_task(tokenizer: Any, name: str, examples: list[Example], folder: Path) -> Path:  # noqa: ANN401
    """Each turn of a conversation is a line of its own: the prompt holds the turns before it."""
    turns = [(example, index) for example in examples for index in range(len(example.turns))]
    lines = [_line(tokenizer, example, index) for example, index in turns]
    if any(line["scoring"] == AGREEMENT for line in lines):
        raise ValueError(f"--tasks: {name} has no reference answers, so lm_eval cannot score it")
    data = (folder / f"{name}.jsonl").resolve()
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    description = {
        "include": str(SHARED.resolve()),
        "task": name,
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "generation_kwargs": {
            # Alike in all examples of a task; lm_eval knows no limit per example.
            "max_gen_toks": max(line["max_tokens"] for line in lines),
            "temperature": 0,
            "until": [],  # otherwise answers end at an empty line
            # The template already put the special tokens in.
            "add_special_tokens": tokenizer.chat_template is None,
        },
    }
    path = data.with_suffix(".yaml")
    path.write_text(json.dumps(description, indent=1))  # JSON is YAML
    return path


def _line(tokenizer: Any, example: Example, index: int) -> dict[str, Any]:  # noqa: ANN401
    turn = example.turns[index]
    return {
        "example": example.key,
        "turn": index,
        "prompt": prompt_text(tokenizer, example, index),
        "question": turn.question,
        "answers": turn.answers,
        "scoring": turn.scoring,
        "max_tokens": turn.max_tokens,
    }


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder or hub name of the served model (its tokenizer)")
    parser.add_argument("--server", metavar="URL", default="http://127.0.0.1:8000")
    parser.add_argument(
        "--budget", type=float, help="share of prompt bytes to keep (default: the server's)"
    )
    parser.add_argument("--tasks", nargs="+", metavar="TASK", default=list(TASKS))
    parser.add_argument("--lengths", nargs="+", type=int, metavar="TOKENS", default=[1024])
    parser.add_argument("--per-task", type=int, default=10, help="examples per task and length")
    parser.add_argument("--out", type=Path, default=Path("results/lm_eval"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
