"""Parts that the transformer's modules share.

Shape suffixes: B batch, L tokens, N heads, D channels (of a head where there are heads, else of the model);
C, F, H, W of latents, K values of a patch.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """The projections around an attention. Queries and keys are normalised over all heads at once."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = nn.RMSNorm(dim, eps=eps)
        self.norm_k = nn.RMSNorm(dim, eps=eps)

    def query(self, x_BLD: Tensor) -> Tensor:
        """[B, L, N, D]"""
        return self._heads(self.norm_q(self.q(x_BLD)))

    def key_value(self, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L, N, D] each; keys are not rotated."""
        return self._heads(self.norm_k(self.k(x_BLD))), self._heads(self.v(x_BLD))

    def output(self, attended_BLND: Tensor) -> Tensor:
        return self.o(attended_BLND.flatten(2))

    def _heads(self, x_BLD: Tensor) -> Tensor:
        return x_BLD.unflatten(-1, (self.num_heads, -1))


def project_patches(conv: nn.Conv3d, x_CFHW: Tensor) -> Tensor:
    """A convolution whose stride is its kernel, as tokens [1, L, D] in the order frame, row, column.

    Takes latents in the dtype of the weights and leaves out what does not fill a patch. It is a matrix
    product of patches in float64, rounded once: libraries cut convolutions and products of few rows among
    their threads, and in float64 the cut does not show in the bits.
    """
    x_CFHW = x_CFHW.to(conv.weight.dtype)
    # Each axis becomes two, (patch, place in the patch), so that the next one is two further.
    for axis, size in zip((1, 3, 5), conv.kernel_size, strict=True):
        count = x_CFHW.shape[axis] // size
        x_CFHW = x_CFHW.narrow(axis, 0, count * size).unflatten(axis, (count, size))
    patches_LK = x_CFHW.permute(1, 3, 5, 0, 2, 4, 6).flatten(3).flatten(0, 2)
    assert conv.bias is not None
    tokens_LD = F.linear(patches_LK.double(), conv.weight.flatten(1).double(), conv.bias.double())
    return tokens_LD.to(conv.weight.dtype)[None]


def linear_float32(linear: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer in float32, whatever the dtype of its weights."""
    return F.linear(x.float(), linear.weight.float(), linear.bias.float())


def modulated_norm(x_BLD: Tensor, scale_D: Tensor, shift_D: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift in float32: a LayerNorm whose weight and bias are the modulation."""
    return F.layer_norm(x_BLD.float(), scale_D.shape, 1 + scale_D, shift_D, eps)
