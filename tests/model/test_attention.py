"""One place with a named backend: never another in its stead."""

import sys

import pytest
import torch

from model.attention import BackendError, attention_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_sdpa_is_plain_softmax_attention_and_says_who_computes_it():
    backend = attention_backend("sdpa", CPU)
    q, k, v = torch.randn(2, 5, 3, 4), torch.randn(2, 7, 3, 4), torch.randn(2, 7, 3, 4)
    scores = torch.einsum("blnd,bsnd->bnls", q, k) / 2
    torch.testing.assert_close(backend(q, k, v), torch.einsum("bnls,bsnd->blnd", scores.softmax(-1), v))
    assert (backend.name, backend.library) == ("sdpa", f"torch {torch.__version__}")


def test_unknown_backend_is_refused():
    with pytest.raises(
        BackendError, match="attention_backend='xformers': must be one of sdpa, flash, cudnn, sage"
    ):
        attention_backend("xformers", CPU)


@pytest.mark.parametrize("name", ["flash", "cudnn", "sage"])
def test_gpu_backends_are_refused_on_a_cpu(name):
    with pytest.raises(BackendError, match=f"attention_backend={name!r}: needs device=cuda, not cpu"):
        attention_backend(name, CPU)


@pytest.mark.parametrize(("name", "package"), [("flash", "flash-attn"), ("sage", "sageattention")])
def test_backend_that_is_not_installed_is_an_error(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setitem(sys.modules, "sageattention", None)
    with pytest.raises(BackendError, match=f"attention_backend={name!r}: needs {package}"):
        attention_backend(name, CUDA)
