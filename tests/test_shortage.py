"""Memory that ran out is known from whatever says so."""

from __future__ import annotations

import errno

import numpy
import pytest
import torch

from expert_merging.shortage import Shortage, shortage_of

ON_GPU = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.50 GiB is "
    "free."
)


@pytest.mark.parametrize(
    "ask",
    [
        lambda: torch.empty(10**15, dtype=torch.uint8),
        lambda: numpy.empty(2**50, dtype="uint8"),
        lambda: bytearray(2**50),
    ],
    ids=["torch", "numpy", "python"],
)
def test_a_real_shortage_of_host_memory_is_known(ask):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        ask()
    found = shortage_of(caught.value)
    assert found is not None
    assert not found.on_gpu
    assert found.asked in (None, 10**15, 2**50)
    assert found.asked is not None or str(caught.value) == ""


@pytest.mark.parametrize(
    ("error", "shortage"),
    [
        (torch.OutOfMemoryError(ON_GPU), Shortage(True, 20 * 2**30)),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512 bytes."), Shortage(True, 512)),
        (RuntimeError("CUDA error: out of memory"), Shortage(True, None)),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            Shortage(True, None),
        ),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), Shortage(False, None)),
        (RuntimeError("expected 3 rows"), None),
        (OSError(errno.EIO, "Input/output error"), None),
        (ValueError("out of memory"), None),
    ],
    ids=str,
)
def test_what_is_said_is_understood(error, shortage):
    assert shortage_of(error) == shortage
