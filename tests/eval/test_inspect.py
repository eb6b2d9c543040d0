"""What ``mdkv inspect`` shows is what the cache holds, and a prompt cannot break its page."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mdkv_vllm.cli import main
from mdkv_vllm.config import read_config
from mdkv_vllm.eval.inspect import ANSWER_TOKENS, inspect_prompt, tokenise
from mdkv_vllm.eval.inspect_page import page
from mdkv_vllm.eval.methods.ours import MixedDim
from mdkv_vllm.models.in_process import InProcessModel

FILLER = "The river was calm and the boats lay still in the harbour of the old town. "
NEEDLE = "The code of the gate is 4711."
BREAKING = "</script><script>alert(1)</script><!-- <b>&amp; @DATA@ @SCRIPT@ \u2028 "
TEXT = 12 * FILLER + BREAKING + NEEDLE + "\n" + 12 * FILLER + "What is the code of the gate?"


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory, model_folder):
    """One family is enough: what depends on families is tested with the methods."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("inspected")
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        vocab_size=49152,
        tie_word_embeddings=True,
        initializer_range=0.2,  # attention is not uniform
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tiny_llama):
    return InProcessModel(tiny_llama, torch.float32)


def data_of(html):
    """The page's JSON block, found as a browser finds it: up to the first end tag."""
    block = re.search(r'<script type="application/json" id="data">(.*?)</script', html, re.S)
    return json.loads(block[1])


def cells_of(data):
    flat = np.frombuffer(base64.b64decode(data["cells"]), np.uint8)
    return torch.tensor(flat.reshape(data["layers"], data["heads"], len(data["tokens"])))


def marked_text(prompt):
    return "".join(prompt.pieces[i] for i in prompt.marked)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"window": 48}, ["drop", "i4", "i8", "full"]),
        # The window is full although no setting names it.
        ({"formats": ["i2", "i8"]}, ["i2", "i8", "full"]),
        ({"formats": "paper", "basis": "prompt"}, ["drop", "r4", "r8", "full"]),
    ],
)
def test_the_page_shows_the_held_cache(model, settings, names):
    prompt = tokenise(model.tokenizer, TEXT, chat=None)
    inspection = inspect_prompt(model, prompt, read_config(0.4, settings))
    data = data_of(page(inspection))

    prefill = model.prefill(prompt.token_ids, settings.get("window", 32))
    cache = MixedDim("ours", settings).apply(model, prefill, 0.4)
    cells = cells_of(data)
    assert torch.equal(cells, cache.formats.to(torch.uint8))
    assert data["formatNames"] == names
    assert data["formatShares"] == sorted(data["formatShares"])
    assert data["formatShares"][-1] == 1
    assert data["share"] == cache.share
    assert data["compressed"]
    # Tokens take most of what is held, and never more; page table and page ends take the rest.
    in_tokens = torch.tensor(data["formatShares"])[cells.long()].mean().item()
    assert 0.6 * cache.share < in_tokens <= cache.share
    kept = cells != names.index("drop") if "drop" in names else torch.ones_like(cache.kept)
    assert torch.equal(kept, cache.kept)

    answer = model.generate(prefill, [cache], ANSWER_TOKENS)[0]
    assert data["answer"] == model.tokenizer.decode(answer, skip_special_tokens=True)
    assert data["fullAnswer"] != data["answer"]
    shown = {k: list(v) if isinstance(v, tuple) else v for k, v in data["settings"].items()}
    assert shown == settings


def test_a_prompt_left_alone_is_shown_as_full(model):
    prompt = tokenise(model.tokenizer, "A short prompt.", chat=None)
    data = data_of(page(inspect_prompt(model, prompt, read_config(0.3, {}))))
    assert not data["compressed"]
    assert data["share"] == 1
    assert {data["formatNames"][i] for i in cells_of(data).unique()} == {"full"}
    assert data["answer"] == data["fullAnswer"]


def test_the_prompt_cannot_break_out_of_the_page(model):
    prompt = tokenise(model.tokenizer, TEXT, chat=None)
    html = page(inspect_prompt(model, prompt, read_config(0.3, {})))
    assert BREAKING in "".join(data_of(html)["tokens"])
    assert len(re.findall(r"<\s*/\s*script", html, re.I)) == 2
    assert "alert(1)</" not in html
    assert html.rstrip().endswith("</html>")


def test_the_page_loads_nothing(model):
    prompt = tokenise(model.tokenizer, "A short prompt.", chat=None)
    html = page(inspect_prompt(model, prompt, read_config(0.3, {})))
    assert "default-src 'none'" in html
    assert not re.search(r"https?:|\bsrc=|@import|url\(|<link", html)


def test_pieces_make_up_the_text(model):
    text = "Zoë said:\n\n  «naïve 🦜 日本»\t" + BREAKING
    plain = tokenise(model.tokenizer, text, chat=False)
    assert "".join(plain.pieces) == text
    assert "" in plain.pieces  # a later part of the parrot
    chat = tokenise(model.tokenizer, text, chat=True)
    joined = "".join(chat.pieces)
    assert joined == model.tokenizer.decode(chat.token_ids)
    assert text.strip() in joined
    assert joined.startswith("<|im_start|>")


def test_find_marks_every_occurrence(model):
    assert tokenise(model.tokenizer, TEXT, chat=None).marked == ()
    prompt = tokenise(model.tokenizer, TEXT, chat=None, find=NEEDLE)
    assert marked_text(prompt).strip() == NEEDLE
    first, last = prompt.marked[0], prompt.marked[-1]
    assert prompt.marked == tuple(range(first, last + 1))
    both = tokenise(model.tokenizer, TEXT, chat=None, find="code of the gate")
    assert marked_text(both) == 2 * " code of the gate"
    broken = tokenise(model.tokenizer, "the\n  blue gate", chat=False, find=" the blue ")
    assert marked_text(broken).split() == ["the", "blue"]
    data = data_of(page(inspect_prompt(model, both, read_config(0.3, {}))))
    assert data["marked"] == list(both.marked)
    assert data["wanted"] == "code of the gate"


def test_command_line(tiny_llama, tmp_path, monkeypatch, capsys):
    out = tmp_path / "page.html"
    monkeypatch.setattr("sys.stdin", io.StringIO(TEXT + "\n"))
    arguments = ["--prompt", "-", "--budget", "0.35", "--settings", '{"window": 64}', "--no-chat"]
    arguments += ["--find", NEEDLE, "--dtype", "float32", "--out", str(out)]
    assert main(["inspect", str(tiny_llama), *arguments]) == 0
    data = data_of(out.read_text("utf-8"))
    assert "".join(data["tokens"]) == TEXT
    assert (data["budget"], data["settings"]) == (0.35, {"window": 64})
    assert (data["model"], data["dtype"]) == (str(tiny_llama), "float32")
    assert f"{data['share']:.1%}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "1.5"], r"--budget is 1.5; allowed are numbers above 0, up to 1"),
        (["--settings", "{window: 3}"], r"--settings is '{window: 3}', which is no JSON"),
        (["--settings", "[1]"], r"--settings is \[1\]; allowed is a JSON object"),
        (["--settings", '{"budget": 0.2}'], r"--settings: budget .* give --budget"),
        (["--settings", '{"windw": 3}'], r"--settings: mixeddim.windw .*did you mean window"),
        (["--settings", '{"window": 0}'], r"--settings: mixeddim.window is 0; allowed are"),
        (["--dtype", "int8"], r"--dtype is 'int8'; allowed are float32, bfloat16, float16"),
        (["--prompt", "/no/such.txt"], r"--prompt: /no/such.txt cannot be read"),
        (["--out", "/no/such/page.html"], r"--out: folder /no/such does not exist"),
    ],
)
def test_errors_name_the_flag_before_a_model_is_loaded(arguments, message, tmp_path, capsys):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(TEXT)
    usual = ["--prompt", str(prompt), "--out", str(tmp_path / "page.html")]
    assert main(["inspect", "/no/such/model", *usual, *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_errors_of_the_prompt(model):
    with pytest.raises(ValueError, match=r"--find: 'The CODE' does not occur in the prompt"):
        tokenise(model.tokenizer, TEXT, chat=None, find="The CODE")
    with pytest.raises(ValueError, match=r"--find: ' ' does not occur"):
        tokenise(model.tokenizer, TEXT, chat=None, find=" ")
    with pytest.raises(ValueError, match=r"--prompt is empty"):
        tokenise(model.tokenizer, "\n", chat=None)
    template = model.tokenizer.chat_template
    model.tokenizer.chat_template = None
    try:
        with pytest.raises(ValueError, match=r"--chat: .*--no-chat"):
            tokenise(model.tokenizer, TEXT, chat=True)
        assert "".join(tokenise(model.tokenizer, TEXT, chat=None).pieces) == TEXT
    finally:
        model.tokenizer.chat_template = template
