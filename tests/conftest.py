"""Tests marked ``gpu`` run wherever torch sees one, and say so where it sees none: ``pytest -m gpu``.

Their results are compared to the bit, so cuDNN and cuBLAS are held to deterministic kernels.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

# A busy machine draws slowly, and is not broken for it: no test here asserts how long anything takes.
settings.register_profile("esperd", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("esperd")


@pytest.fixture(autouse=True)
def _on_a_gpu(request, monkeypatch):
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    import torch  # only here: tests of the daemon's and the CLI's own code run without it

    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU here")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
        torch.use_deterministic_algorithms(mode=True)
        yield
        torch.use_deterministic_algorithms(mode=False)
