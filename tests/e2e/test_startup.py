"""What cannot work is refused before the first request, by the name of the setting."""

import shutil
import subprocess

import pytest
import torch
from serving import environment, vllm_command

from mdkv_vllm.artifacts.store import ArtifactInfo, model_identity, save_basis
from mdkv_vllm.core.basis import Basis

pytestmark = pytest.mark.server


def failed_start(model, *arguments):
    """Output of a server that must not start."""
    command = [
        vllm_command(), "serve", str(model), "--host=127.0.0.1", "--port=1", "--enforce-eager",
        "--attention-backend=mixeddim", "--max-model-len=512", *arguments,
    ]  # fmt: skip
    run = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=400, check=False
    )
    assert run.returncode != 0
    return run.stdout + run.stderr


def test_an_unknown_setting(model_folder):
    """One by one they are tests/plugin/test_refusals.py's part."""
    argument = '--additional-config={"mixeddim": {"bugdet": 0.3}}'
    assert "did you mean budget" in failed_start(model_folder, argument)


def test_a_foreign_basis(model_folder, tmp_path):
    """Damage of any other kind is tests/artifacts' part."""
    path = tmp_path / "basis.safetensors"
    eye = torch.eye(64).expand(30, 3, 64, 64)
    save_basis(path, Basis(eye, eye), ArtifactInfo("other", "name:other", "test", "", 1))
    paper = '--additional-config={"mixeddim": {"formats": "paper", "basis": "%s"}}'
    assert "calibrated for other" in failed_start(model_folder, paper % path)


def test_a_basis_in_the_model_folder_is_no_weight(model_folder, tmp_path):
    """vLLM reads every safetensors file of a folder that has no index; ours must stay out."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    eye = torch.eye(64).expand(30, 3, 64, 64)
    info = ArtifactInfo("model", model_identity(str(folder)), "test", "", 1)
    save_basis(folder / "mixeddim_basis.safetensors", Basis(eye, eye), info)
    from vllm.model_executor.model_loader.weight_utils import filter_duplicate_safetensors_files

    files = [str(f) for f in folder.glob("*.safetensors")]
    kept = filter_duplicate_safetensors_files(files, str(folder), "model.safetensors.index.json")
    assert [f.rsplit("/", 1)[1] for f in kept] == ["model.safetensors"]
