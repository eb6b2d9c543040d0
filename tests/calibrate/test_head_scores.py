"""Head scores: the definition, the file, and that they find the heads that answers need."""

import pytest
import torch

from mdkv_vllm.artifacts.store import (
    ArtifactError,
    ArtifactInfo,
    load_head_scores,
    model_identity,
    save_head_scores,
)
from mdkv_vllm.calibrate.head_scores import credit, locate, measure_head_scores, questions
from mdkv_vllm.models import prepare_smollm2
from mdkv_vllm.models.held_cache import HeldCache
from mdkv_vllm.models.in_process import InProcessModel
from mdkv_vllm.tasks.example import score
from mdkv_vllm.tasks.prompt import prompt_text
from mdkv_vllm.tasks.text import Haystack, reference_prose, token_counter


def test_credit_is_attention_of_the_strongest_places_that_lie_in_the_answer():
    weights = torch.tensor(
        [
            [[0.5, 0.3, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4]],  # places 0 and 1, then 2 and 3
            [[0.0, 0.1, 0.3, 0.6], [0.7, 0.2, 0.1, 0.0]],
        ]
    )
    found = credit(weights, torch.tensor([1, 2]))
    torch.testing.assert_close(found, torch.tensor([(0.3 + 0.3) / 2, (0.3 + 0.2) / 2]))


def save(path, scores, model):
    save_head_scores(path, scores, ArtifactInfo(model, model_identity(model), "test", "", 1))


def test_scores_are_summed_over_each_group(tmp_path):
    path = tmp_path / "scores.safetensors"
    save(path, torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]), "some/model")
    assert load_head_scores(path, "some/model", (2, 2)).tolist() == [
        [3 / 8, 7 / 8],
        [11 / 8, 15 / 8],
    ]


@pytest.mark.parametrize(
    ("scores", "model", "message"),
    [
        (torch.ones(2, 4), "other/model", "was calibrated for other/model"),
        (torch.ones(3, 4), "some/model", r"shape \[3, 4\]; some/model has 2 layers of 2 KV heads"),
        (torch.ones(2, 3), "some/model", "2 layers of 2 KV heads"),
        (torch.zeros(2, 4), "some/model", "negative or all 0"),
        (torch.full((2, 4), torch.nan), "some/model", "scores is not finite"),
    ],
)
def test_scores_that_do_not_fit_are_refused(tmp_path, scores, model, message):
    path = tmp_path / "scores.safetensors"
    save(path, scores, model)
    with pytest.raises(ArtifactError, match=message):
        load_head_scores(path, "some/model", (2, 2))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return InProcessModel(prepare_smollm2(tmp_path_factory.mktemp("model") / "SmolLM2"))


@pytest.fixture(scope="module")
def examples(model):
    haystack = Haystack(reference_prose(), token_counter(model.tokenizer))
    return list(questions(haystack, [300], 6))


@pytest.mark.model
def test_answers_need_the_heads_that_score_high_and_no_others(model, examples):
    found = measure_head_scores(model, examples)
    heads = found.scores.unflatten(1, (model.num_kv_heads, -1)).sum(-1).flatten()
    order = heads.argsort(descending=True)
    survived = {"best": 0, "worst": 0}
    asked = examples[:3]
    for example in asked:
        turn = example.turns[0]
        prompt, hidden = locate(model.tokenizer, prompt_text(model.tokenizer, example, 0), turn)
        assert model.tokenizer.decode([prompt[at] for at in hidden]).strip() == turn.answers[0]
        prefill = model.prefill(prompt, 1)
        caches = []
        for blind in (order[:20], order[-20:]):
            kept = torch.ones(prefill.keys.shape[:3], dtype=torch.bool)
            for head in blind.tolist():
                kept.flatten(0, 1)[head, hidden] = False
            caches.append(HeldCache(prefill.keys, prefill.values, kept, 1.0))
        answers = model.generate(prefill, caches, turn.max_tokens)
        for name, answer in zip(survived, answers, strict=True):
            survived[name] += score(turn, model.tokenizer.decode(answer)) == 1
    assert survived == {"best": 0, "worst": len(asked)}


@pytest.mark.model
def test_too_few_right_answers_are_refused(model, examples):
    with pytest.raises(ValueError, match=r"answers \d of 3 questions; at least 8"):
        measure_head_scores(model, examples[:3])
