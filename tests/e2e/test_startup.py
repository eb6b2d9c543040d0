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


SPECULATIVE = '{"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}'


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (['--additional-config={"mixeddim": {"bugdet": 0.3}}'], "did you mean budget"),
        (['--additional-config={"mixeddim": {"budget": 7}}'], "mixeddim.budget is 7"),
        (['--additional-config={"mixeddim": {"formats": ["r7"]}}'], "multiples of 4"),
        (["--kv-cache-dtype=fp8"], "--kv-cache-dtype fp8"),
        (["--speculative-config", SPECULATIVE], "--speculative-config"),
    ],
)
def test_settings(model_folder, arguments, named):
    assert named in failed_start(model_folder, *arguments)


def test_missing_corrupt_and_foreign_basis(model_folder, tmp_path):
    paper = '--additional-config={"mixeddim": {"formats": "paper", "basis": "%s"}}'
    path = tmp_path / "basis.safetensors"
    assert "does not exist" in failed_start(model_folder, paper % path)
    path.write_bytes(b"not a basis")
    assert "damaged" in failed_start(model_folder, paper % path)
    eye = torch.eye(64).expand(30, 3, 64, 64)
    save_basis(path, Basis(eye, eye), ArtifactInfo("other", "name:other", "test", "", 1))
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
