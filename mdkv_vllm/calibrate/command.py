"""``mdkv calibrate`` and ``mdkv head-scores``: files about a model, and reports on them."""

from __future__ import annotations

import hashlib
import pydoc_data.topics
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mdkv_vllm.artifacts.store import (
    ArtifactInfo,
    model_identity,
    save_basis,
    save_head_scores,
)
from mdkv_vllm.calibrate.moments import Moments, gather_moments
from mdkv_vllm.core.basis import Basis, principal_basis

HEAD_METHOD = "HeadKV-R2 on hidden numbers, alone and among numbers with other keys, per query head"
METHOD = "uncentred PCA of keys after rotary embedding, and of values, per layer and KV head"


def calibrate(
    model_name: str, texts: list[Path], out: Path, max_tokens: int, console: Console
) -> Basis:
    """Compute and save a model's basis.

    Args:
        model_name: folder or hub name of a Hugging Face causal language model.
        texts: UTF-8 text files; none stands for Python's own language reference, which
            every Python brings along.
        out: the basis file; a plot of the energy per rank is written beside it as PNG.
        max_tokens: stop after so many tokens.
        console: where progress and report go.

    Raises:
        ValueError: the texts are too short, or the model has sliding windows.
        OSError: a text cannot be read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mdkv_vllm.models.windows import refuse_windows

    refuse_windows(model_name)
    text = "\n\n".join(path.read_text("utf-8") for path in texts) if texts else reference_text()
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    token_ids = tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32).eval()
    with _progress("calibrating", console) as progress:
        task = progress.add_task("", total=len(token_ids))
        moments = gather_moments(model, token_ids, lambda n: progress.advance(task, n))
    head_size = moments.keys.shape[-1]
    basis = Basis(
        principal_basis(moments.keys, head_size), principal_basis(moments.values, head_size)
    )
    digest = hashlib.sha256(text.encode()).hexdigest()
    info = ArtifactInfo(model_name, model_identity(model_name), METHOD, digest, moments.tokens)
    save_basis(out, basis, info)
    _report(moments, basis, out, console)
    return basis


def head_scores(
    model_name: str,
    texts: list[Path],
    out: Path,
    lengths: list[int],
    per_length: int,
    device: str,
    console: Console,
) -> None:
    """Measure and save a model's head scores.

    Args:
        model_name: folder or hub name of a Hugging Face causal language model.
        texts: UTF-8 text files to hide answers in; none stands for Python's own language
            reference.
        out: the file to write.
        lengths: prompt lengths in tokens.
        per_length: questions of either kind at each length.
        device: torch device.
        console: where progress and report go.

    Raises:
        ValueError: the model answers too few questions, or a text is too short.
        OSError: a text cannot be read.
    """
    from mdkv_vllm.calibrate.head_scores import measure_head_scores, questions
    from mdkv_vllm.models.in_process import InProcessModel
    from mdkv_vllm.tasks.text import Haystack, load_text, reference_prose, token_counter

    text = load_text(texts) if texts else reference_prose()
    model = InProcessModel(model_name, torch.bfloat16, device)
    haystack = Haystack(text, token_counter(model.tokenizer))
    examples = list(questions(haystack, lengths, per_length))
    with _progress("asking", console) as progress:
        task = progress.add_task("", total=len(examples))
        found = measure_head_scores(model, examples, lambda: progress.advance(task))
    digest = hashlib.sha256(text.encode()).hexdigest()
    info = ArtifactInfo(model_name, model_identity(model_name), HEAD_METHOD, digest, found.tokens)
    save_head_scores(out, found.scores, info)
    by_kv_head = found.scores.unflatten(1, (model.num_kv_heads, -1)).sum(-1).flatten()
    shares = (by_kv_head / by_kv_head.sum()).sort(descending=True).values.cumsum(0)
    halves = int((shares < 0.5).sum()) + 1
    most = int((shares < 0.9).sum()) + 1
    console.print(
        f"{found.answered} of {found.asked} questions answered right; {halves} of {len(shares)} "
        f"KV heads hold half of the scores, {most} hold 90 %; written: {out}",
        soft_wrap=True,
    )


def _progress(label: str, console: Console) -> Progress:
    return Progress(
        TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )


def reference_text() -> str:
    """Python's language reference as shipped with every Python: some 150,000 words of English."""
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def energy_per_rank(moment: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Share of the energy that the first r columns keep, averaged over layers and heads.

    Args:
        moment: ``[layers, kv_heads, d, d]``.
        basis: ``[layers, kv_heads, d, rank]``.

    Returns:
        float64 ``[rank]``, from the first column alone to all of them.
    """
    basis = basis.double()
    energy = torch.einsum("lhdr,lhde,lher->lhr", basis, moment, basis)
    total = moment.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    return (energy / total).cumsum(-1).mean((0, 1))


def _report(moments: Moments, basis: Basis, out: Path, console: Console) -> None:
    curves = {
        "keys": energy_per_rank(moments.keys, basis.keys),
        "values": energy_per_rank(moments.values, basis.values),
    }
    size = basis.rank
    table = Table(title=f"energy kept by rank (of {size}), mean of layers and heads")
    table.add_column("rank", justify="right")
    for name in curves:
        table.add_column(name, justify="right")
    for rank in (size // 8, size // 4, size // 2, size):
        table.add_row(str(rank), *(f"{curve[rank - 1]:.3f}" for curve in curves.values()))
    console.print(table)
    plot = out.with_suffix(".png")
    _plot(curves, plot)
    console.print(f"{moments.tokens} tokens; basis in {out}, plot in {plot}", soft_wrap=True)


def _plot(curves: dict[str, torch.Tensor], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, curve in curves.items():
        axes.plot(range(1, len(curve) + 1), curve.tolist(), label=name)
    axes.set(xlabel="rank", ylabel="share of energy kept", ylim=(0, 1.02), title="Energy by rank")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
