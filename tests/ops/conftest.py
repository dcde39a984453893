"""Fixtures of the tests of ops."""

import ctypes

import pytest
import torch

from powertrain.native import loader
from powertrain.native.abi import declare
from tests.ops.emulation import emulated_library


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    """The kernel library, for calls of single stages: on a GPU the real one, else the sm80 kernels emulated."""
    if torch.cuda.is_available():
        return loader.library()
    emulated = ctypes.CDLL(str(emulated_library(without=("sm90",))))
    declare(emulated)
    return emulated
