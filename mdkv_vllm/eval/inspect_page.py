"""One self-contained HTML page of an inspection; nothing in it is loaded from elsewhere."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from mdkv_vllm.eval.inspect import Inspection

TEMPLATE = Path(__file__).with_name("inspect.html")
SCRIPT = TEMPLATE.with_suffix(".js")


def page(inspection: Inspection) -> str:
    """Write the page.

    The script builds everything from one JSON block and sets text as text only, so the block is
    the one place where the prompt could break out of the page.

    Args:
        inspection: what to show.
    """
    layers, heads, _ = inspection.formats.shape
    prompt = inspection.prompt
    data = {
        "model": inspection.model,
        "dtype": inspection.dtype,
        "budget": inspection.budget,
        "settings": inspection.settings,
        "share": inspection.share,
        "compressed": inspection.compressed,
        "answer": inspection.answer,
        "fullAnswer": inspection.full_answer,
        "formatNames": inspection.format_names,
        "formatShares": inspection.format_shares,
        "layers": layers,
        "heads": heads,
        "tokens": prompt.pieces,
        "wanted": prompt.wanted,
        "marked": prompt.marked,
        # One byte per cell, a row of tokens for each head of each layer.
        "cells": base64.b64encode(inspection.formats.contiguous().numpy().tobytes()).decode(),
    }
    # "</script>" and "<!--" would end or change the block; JSON may write "<" as an escape.
    block = json.dumps(data).replace("<", "\\u003c")
    # The prompt goes in last, as nothing in it may be taken for a place in the template.
    template = TEMPLATE.read_text("utf-8").replace("@SCRIPT@", SCRIPT.read_text("utf-8"))
    return template.replace("@DATA@", block)
