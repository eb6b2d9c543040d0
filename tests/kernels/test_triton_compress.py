"""What is the Triton compression kernels' own, interpreted."""

import interpreter
import pytest
import torch
from compress_calls import InterpretedKernels
from test_compress_conformance import chosen_for, prompt_of

from mdkv_vllm.core.packing import unpack_list

pytestmark = pytest.mark.slow

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def kernels():
    with interpreter.start() as process:
        yield InterpretedKernels(process)


def test_pack_writes_no_page_that_is_not_there(kernels):
    prompt, cache = prompt_of(("i8", "full"), 64, span=100, layers=1)
    geometry = prompt.layout.geometry
    room = torch.full((9, geometry.page_bytes), 0xAB, dtype=torch.uint8)
    chosen = chosen_for(kernels, prompt, torch.ones(1, 2, 100, dtype=torch.int64))
    kernels.layers(prompt, range(1), None).pack(chosen, room[:5], torch.tensor(0))
    assert (room[5:] == 0xAB).all()
    keys, _ = unpack_list(room[:5], 80, prompt.layout.formats.formats[1], geometry)
    torch.testing.assert_close(keys, cache[0, 0, 0, :80].float())
