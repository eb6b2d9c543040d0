"""The Dockerfile: linted, and what its images promise."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dockerfile import DOCKERFILE, ROOT, environment, health_check, lineage, stages

import mdkv_vllm

TARGETS = ("cpu", "cuda")
CHART = ROOT / "deploy/helm/mdkv-vllm"


def values(target, instruction):
    return [rest for name, rest in lineage(target) if name == instruction]


def test_hadolint_finds_nothing():
    hadolint = Path(sys.executable).parent / "hadolint"
    subprocess.run([hadolint, "--failure-threshold", "style", DOCKERFILE], check=True)


def test_hadolint_really_runs(tmp_path):
    file = tmp_path / "Dockerfile"
    file.write_text(DOCKERFILE.read_text().replace("# hadolint ignore=DL3008\n", ""))
    hadolint = Path(sys.executable).parent / "hadolint"
    found = subprocess.run([hadolint, file], check=False, capture_output=True, text=True)
    assert found.returncode == 1
    assert "DL3008" in found.stdout


def test_base_images_are_pinned():
    images = re.findall(r"(?m)^ARG \w+_IMAGE=(\S+)$", DOCKERFILE.read_text())
    assert images
    for image in images:
        assert re.search(r":[0-9]+\.[0-9]+\.[0-9]+-", image)
    assert {s.base for s in stages().values()} - set(stages()) == {
        "${PYTHON_IMAGE}",
        "${CUDA_IMAGE}",
    }


@pytest.mark.parametrize("target", TARGETS)
def test_images_run_without_rights_and_secrets(target):
    assert values(target, "USER")[-1] == "10001:10001"
    account = yaml.safe_load((CHART / "values.yaml").read_text())["podSecurityContext"]
    assert f"{account['runAsUser']}:{account['runAsGroup']}" == "10001:10001"
    assert values(target, "ENTRYPOINT") == ['["vllm", "serve"]']
    assert environment(target)["PATH"].startswith("/opt/mdkv/bin:")
    assert environment(target)["HOME"] == "/var/cache/mdkv"
    assert set(json.loads(values(target, "VOLUME")[0])) == {"/models", "/var/cache/mdkv"}
    assert health_check(target)[0] == "python3"
    for _, rest in lineage(target):
        assert not re.search(r"(?i)(token|password|secret|api_key)\s*=", rest)


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_of_the_build_is_in_an_image(target):
    copied = values(target, "COPY")
    assert all(rest.startswith("--from=") for rest in copied)
    assert not any("g++" in rest for rest in values(target, "RUN"))


@pytest.mark.parametrize("target", TARGETS)
def test_labels(target):
    labels = " ".join(values(target, "LABEL"))
    version = mdkv_vllm.__version__
    assert f'org.opencontainers.image.version="{version}"' in labels
    for name in ("title", "description", "licenses", "revision"):
        assert f"org.opencontainers.image.{name}=" in labels
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == version


def test_pins_are_exact_and_whole():
    for name in ("cpu", "cuda", "default-model"):
        lines = (ROOT / f"requirements/{name}.txt").read_text().splitlines()
        packages = [line for line in lines if line and not line.startswith("#")]
        assert packages
        assert all(re.match(r"^[a-z0-9.-]+==[^ ]+( *;.*)?$", line) for line in packages)
    cuda = (ROOT / "requirements/cuda.txt").read_text()
    assert re.search(r"(?m)^vllm==0\.32\.[0-9]+$", cuda)
