"""Which models the commands do not know how to read: those with sliding windows."""

from __future__ import annotations

from pathlib import Path

FULL = "full_attention"


def refuse_windows(model: str | Path) -> None:
    """Raise where some layers of a model do not attend to everything.

    Args:
        model: folder or hub name of a Hugging Face causal language model.

    Raises:
        ValueError: they do not.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    kinds = getattr(config, "layer_types", None) or [FULL]
    if any(kind != FULL for kind in kinds) or getattr(config, "sliding_window", None):
        raise ValueError(
            f"{model} has layers that do not see all tokens (sliding windows, ...), which this "
            "command does not know; a server compresses the others without what it would make"
        )
