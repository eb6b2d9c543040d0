"""Scores answers inside lm_eval with the same function as ``mdkv eval``; task.yaml names it."""

from __future__ import annotations

from typing import Any

from mdkv_vllm.tasks.example import Turn, score


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The score of one answer, 0 to 1.

    Args:
        doc: an example as run.py wrote it.
        results: the answer, alone.
    """
    turn = Turn(doc["question"], tuple(doc["answers"]), doc["scoring"], doc["max_tokens"])
    return {"score": score(turn, results[0])}
