"""The settings as a JSON schema, by which the Helm chart refuses wrong values.

    python -m mdkv_vllm.settings_schema deploy/helm/mdkv-vllm/values.schema.json

puts the schema into that file as its property ``mixeddim`` and leaves the rest alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mdkv_vllm.config import (
    BLOCK_NAME,
    EVEN_HEADS,
    KERNELS,
    MAX_HEAD_POWER,
    MAX_HEAD_SIZE,
    MAX_WINDOW,
    MIN_SEGMENT_TOKENS,
    PREFILLS,
    PRESETS,
    PROMPT_BASIS,
    SHARED_PREFIXES,
)
from mdkv_vllm.core.formats import CODE_ZERO
from mdkv_vllm.core.losses import LOSSES
from mdkv_vllm.core.plan import Rule

_SET = {"not": {"type": "null"}}
"""Schema of a setting that is given: null means the default."""


def settings_schema() -> dict[str, Any]:
    """A JSON schema (draft 7) that holds for what ``MixedDimConfig`` accepts, and for no more.

    It cannot know the model: ranks are checked against its head size, and files for their
    existence, at start-up. JSON has one kind of number, so 16.0 passes for 16.
    """
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "enabled": {"type": "boolean"},
            "budget": _above_0(1),
            "budget_tokens": {"type": ["integer", "null"], "minimum": 1},
            "window": {"type": "integer", "minimum": 1, "maximum": MAX_WINDOW},
            "segment_tokens": {"type": "integer", "minimum": MIN_SEGMENT_TOKENS},
            "segments": {"enum": [rule.value for rule in Rule]},
            "shared_prefixes": {"enum": list(SHARED_PREFIXES)},
            "formats": {"anyOf": [{"enum": list(PRESETS)}, _format_list()]},
            "basis": {"type": ["string", "null"], "minLength": 1},
            "heads": {"type": ["string", "null"], "minLength": 1},
            "head_share": _above_0(1),
            "head_power": _above_0(MAX_HEAD_POWER),
            "loss": {"enum": list(LOSSES)},
            "min_prompt_tokens": {"type": "integer", "minimum": 1},
            "kernels": {"enum": list(KERNELS)},
            "prefill": {"enum": list(PREFILLS)},
        },
        "allOf": [
            {"not": _given("budget", "budget_tokens")},
            {
                "if": _given("basis"),
                "then": {"properties": {"formats": _ranked()}, "required": ["formats"]},
            },
            {
                "if": _given("basis") | {"properties": {"basis": {"const": PROMPT_BASIS}}},
                "then": {"properties": {"segments": {"not": {"const": Rule.ROLLING.value}}}},
            },
            {
                "if": {"properties": {"heads": {"const": EVEN_HEADS}}, "required": ["heads"]},
                "then": {"not": {"anyOf": [_given("head_share"), _given("head_power")]}},
            },
        ],
    }


def _above_0(most: float) -> dict[str, Any]:
    return {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": most}


def _given(*names: str) -> dict[str, Any]:
    return {"properties": dict.fromkeys(names, _SET), "required": list(names)}


def _format_list() -> dict[str, Any]:
    """Each format once, and not ``drop`` alone."""
    ranks = "|".join(str(rank) for rank in range(4, MAX_HEAD_SIZE, 4))
    bits = "".join(str(bits) for bits in sorted(CODE_ZERO))
    return {
        "type": "array",
        "items": {
            "type": "string",
            "pattern": f"^(drop|full|i[{bits}]|r({ranks})(i[{bits}])?)$",
        },
        "uniqueItems": True,
        "contains": {"not": {"const": "drop"}},
    }


def _ranked() -> dict[str, Any]:
    return {
        "anyOf": [{"const": "paper"}, {"type": "array", "contains": {"pattern": "^r"}}],
    }


def write_into(path: Path) -> None:
    """Replace the property ``mixeddim`` of a chart's ``values.schema.json``."""
    chart = json.loads(path.read_text("utf-8"))
    chart["properties"][BLOCK_NAME] = settings_schema()
    path.write_text(json.dumps(chart, indent=2, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    write_into(Path(sys.argv[1]))
