import pytest
from cuda_host.build import build


@pytest.fixture(scope="session")
def cuda_host_library(tmp_path_factory):
    """The CUDA kernels, compiled to run on this machine's CPU."""
    return build(tmp_path_factory.mktemp("cuda_host"))
