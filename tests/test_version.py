"""The version stands in the package; what cannot read it there says the same."""

from importlib.metadata import version
from pathlib import Path

import yaml

from mdkv_vllm import __version__

ROOT = Path(__file__).parents[1]


def test_one_version():
    assert version("mdkv-vllm") == __version__
    chart = yaml.safe_load((ROOT / "deploy/helm/mdkv-vllm/Chart.yaml").read_text())
    assert chart["appVersion"] == __version__
    assert f'image.version="{__version__}"' in (ROOT / "Dockerfile").read_text()
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
