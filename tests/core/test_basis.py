import pytest
import torch

from mdkv_vllm.core.basis import hadamard, principal_basis


@pytest.mark.parametrize("size", [32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512])
def test_hadamard_is_symmetric_orthonormal(size):
    matrix = hadamard(size)
    assert torch.equal(matrix, matrix.T)
    assert torch.allclose(matrix @ matrix, torch.eye(size), atol=1e-5)


def test_principal_basis_finds_planted_directions_in_order():
    directions = torch.linalg.qr(torch.randn(3, 64, 64)).Q
    spread = torch.logspace(1, -1, 64)
    data = (torch.randn(3, 5000, 64) * spread) @ directions.transpose(1, 2)
    basis = principal_basis(data.transpose(1, 2) @ data, 8)
    assert torch.allclose(basis.transpose(1, 2) @ basis, torch.eye(8).expand(3, 8, 8), atol=1e-4)
    captured = torch.linalg.norm(directions[:, :, :8].transpose(1, 2) @ basis, dim=(1, 2)).square()
    assert torch.all(captured > 7.5)
    energy = (data @ basis).square().mean(1)
    assert torch.all(energy[:, :-1] >= energy[:, 1:])


def test_principal_basis_is_deterministic_in_sign():
    moment = torch.randn(32, 32)
    moment = moment @ moment.T
    assert torch.equal(principal_basis(moment, 4), principal_basis(moment.clone(), 4))
    leading = principal_basis(moment, 4)
    assert torch.all(leading.gather(0, leading.abs().argmax(0, keepdim=True)) > 0)
