"""Which decode kernel is taken, and the timing that decides between two."""

import pytest
import torch

from mdkv_vllm.config import ConfigError
from mdkv_vllm.core.formats import PageGeometry, parse_formats
from mdkv_vllm.core.layout import LeaseLayout
from mdkv_vllm.core.reference import read_page_table
from mdkv_vllm.kernels import autotune, registry
from mdkv_vllm.kernels.cpu.decode import CpuDecode
from mdkv_vllm.kernels.cuda import library as cuda
from mdkv_vllm.kernels.interface import DecodeConfig

GPU = torch.device("cuda")


def layout(names, prompt_basis_rank=0):
    geometry = PageGeometry(16, 64, torch.bfloat16)
    return LeaseLayout(geometry, parse_formats(names, geometry), 4, 2, prompt_basis_rank)


@pytest.mark.parametrize(
    ("asked", "built", "expected"),
    [
        ("auto", True, ("cuda",)),
        ("auto", False, ("triton",)),
        ("autotune", True, ("cuda", "triton")),
        ("autotune", False, ("triton",)),
        ("cuda", True, ("cuda",)),
        ("triton", True, ("triton",)),
    ],
)
def test_kernels_on_gpus(monkeypatch, asked, built, expected):
    monkeypatch.setattr(cuda, "why_not", lambda: "" if built else "they are not built")
    assert registry.decode_kernels(asked, GPU) == expected


def test_what_cannot_be_had_is_refused(monkeypatch):
    monkeypatch.setattr(cuda, "why_not", lambda: "they are not built")
    with pytest.raises(ConfigError, match=r"mixeddim.kernels is 'cuda', but they are not built"):
        registry.decode_kernels("cuda", GPU)
    with pytest.raises(ConfigError, match=r"'cpu', but the model runs on cuda; allowed there"):
        registry.decode_kernels("cpu", GPU)
    for asked in ("cuda", "triton", "autotune"):
        with pytest.raises(ConfigError, match=rf"'{asked}', but the model runs on the CPU; allow"):
            registry.decode_kernels(asked, torch.device("cpu"))


def test_the_faster_is_taken(monkeypatch):
    monkeypatch.setattr(cuda, "why_not", lambda: "")
    monkeypatch.setattr(autotune, "measure", lambda *_: {"cuda": 3.0, "triton": 2.0})
    monkeypatch.setattr(registry, "DECODE", {"cuda": lambda _: "C", "triton": lambda _: "T"})
    nothing = torch.empty(0, device="meta")
    monkeypatch.setattr(registry, "decode_kernels", lambda *_: ("cuda", "triton"))
    setting = DecodeConfig(nothing, layout(("i8",)), 1, None, 1.0, 8)
    assert registry.decode_kernel("autotune", setting) == (
        "triton (1.50 x as fast as cuda here)",
        "T",
    )


@pytest.mark.parametrize(
    ("names", "basis"), [(("drop", "i4", "i8", "full"), 0), (("r16", "i8"), 0), (("r16",), 16)]
)
def test_autotune_s_leases_are_whole(names, basis):
    """Every list's pages lie in the lease, one after the other; what is read is finite."""
    made = autotune.Workload(layout(names, basis), 3, torch.device("cpu"), 4 << 20)
    first, held = made.batch.leases[5, 0].tolist()
    assert first == 0
    pages = made.kv_cache[made.batch.block_table[5, :held].long()].view(torch.uint8).flatten(0, 1)
    table = read_page_table(pages.flatten(1), made.layout)
    assert (table[..., 0] > 0).all()
    capacity = torch.tensor([f.tokens_per_page for f in made.layout.formats.formats])
    ends = table[..., 1] + -(-table[..., 0] // capacity)
    assert int(ends.max()) <= len(pages)
    assert torch.equal(ends.flatten()[:-1], table[..., 1].flatten()[1:])
    made.output.fill_(torch.nan)
    made.attend(CpuDecode(made.config))
    assert (made.output == 0).all()
