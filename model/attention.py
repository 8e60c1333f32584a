"""The one place that computes softmax attention, with a backend that is chosen by name.

Shape suffixes: B batch, L queries, S keys, N heads, D head size.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = ("sdpa", "flash", "cudnn", "sage")


class BackendError(ValueError):
    """The attention backend that was asked for cannot be used here."""


@dataclass(frozen=True)
class AttentionBackend:
    """softmax(q k^T / sqrt(D)) v, without a mask: q [B, L, N, D], k and v [B, S, N, D] -> [B, L, N, D]."""

    name: str
    library: str
    """What computes it, with its version, for reports."""
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]

    def __call__(self, q_BLND: Tensor, k_BSND: Tensor, v_BSND: Tensor) -> Tensor:
        return self.attend(q_BLND, k_BSND, v_BSND)


def attention_backend(name: str, device: torch.device) -> AttentionBackend:
    """The backend `name` for tensors on `device`.

    Raises BackendError if there is no such backend, if it is not installed, or if it does not run on that
    device; another one is never taken instead.
    """
    if name not in BACKENDS:
        raise BackendError(f"attention_backend={name!r}: must be one of {', '.join(BACKENDS)}")
    if name == "sdpa":
        return AttentionBackend(name, f"torch {torch.__version__}", _sdpa)
    if device.type != "cuda":
        raise BackendError(f"attention_backend={name!r}: needs device=cuda, not {device.type}")
    if name == "cudnn":
        return AttentionBackend(name, f"cuDNN {torch.backends.cudnn.version()}", _cudnn)
    package, load = ("flash-attn", _flash) if name == "flash" else ("sageattention", _sage)
    try:
        return AttentionBackend(name, f"{package} {version(package)}", load())
    except ImportError as error:
        raise BackendError(f"attention_backend={name!r}: needs {package} ({error})") from error


def _sdpa(q_BLND: Tensor, k_BSND: Tensor, v_BSND: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q_BLND, k_BSND, v_BSND))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _cudnn(q_BLND: Tensor, k_BSND: Tensor, v_BSND: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(q_BLND, k_BSND, v_BSND)


def _flash() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return importlib.import_module("flash_attn").flash_attn_func


def _sage() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    sageattn = importlib.import_module("sageattention").sageattn
    return lambda q, k, v: sageattn(q, k, v, tensor_layout="NHD")
