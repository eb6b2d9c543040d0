"""What the chart's examples install is exactly what tests/helm/golden says."""

import pytest
from golden import GOLDEN, INSTALLS, golden


@pytest.mark.parametrize("install", INSTALLS)
def test_manifests_are_the_golden_ones(install):
    expected = (GOLDEN / f"{install}.yaml").read_text()
    assert golden(install) == expected, "changed on purpose? run: make chart"
