"""A small vision-language model, random: image tokens are compressed as all others are."""

import pytest
import torch
from serving import run_script
from transformers import (
    AutoTokenizer,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
)

pytestmark = pytest.mark.server

SPECIAL = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
ROLLING = {"budget": 0.3, "segments": "rolling", "segment_tokens": 128}


@pytest.fixture(scope="module")
def model(tmp_path_factory, prepared_model):
    """Idefics3: 16 tokens a picture of 112 x 112 pixels, and what stands around them."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("idefics3")
    tokenizer = AutoTokenizer.from_pretrained(prepared_model)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    vision = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 112, "patch_size": 14,
    }  # fmt: skip
    text = LlamaConfig(
        hidden_size=256, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, vocab_size=len(tokenizer), initializer_range=0.2,
        max_position_embeddings=2048, pad_token_id=0,
    )  # fmt: skip
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = Idefics3Config(
        vision_config=vision, text_config=text, image_token_id=image, scale_factor=2, pad_token_id=0
    )
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    size = {"longest_edge": 112}
    images = Idefics3ImageProcessorPil(do_image_splitting=False, size=size, max_image_size=size)
    Idefics3Processor(images, tokenizer, image_seq_len=16).save_pretrained(folder)
    return folder


def ask(tmp_path, model, **engine):
    engine = {"model": str(model), "dtype": "float32", "max_model_len": 1024, **engine}
    return run_script("images.py", tmp_path, {"engine": engine})


def test_pictures_are_compressed_and_never_shared_with_other_pictures(tmp_path, model):
    stock = ask(tmp_path, model)
    ours = ask(
        tmp_path, model, attention_backend="mixeddim", additional_config={"mixeddim": ROLLING}
    )
    assert ours["full"] == stock["full"]
    # A request whose first picture differs gets nothing from the cache, though every token is
    # equal; the next question about the same pictures gets their segments.
    for name in ("shared", "alone"):
        assert [cached for _, cached in ours[f"{name} False"]] == [0, 0]
        assert all(cached >= 256 for _, cached in ours[f"{name} True"])
    for more in (False, True):
        assert ours[f"shared {more}"] == ours[f"alone {more}"]
    answers = [tuple(answer) for answer, _ in ours["shared False"] + ours["shared True"]]
    assert len(set(answers)) == 4
    assert answers[:2] != [tuple(answer) for answer in ours["full"]]
    assert sum(report["kept_share"] < 0.5 for report in ours["recent"]) >= 8
