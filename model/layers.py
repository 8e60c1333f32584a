"""Parts that the transformer's modules share.

Shape suffixes: B batch, L tokens, N heads, D channels (of a head where there are heads, else of the model);
C, F, H, W of latents, K values of a patch.
"""

import torch.nn.functional as F
from torch import Tensor, nn

ROW_GRAIN, COLUMN_GRAIN = 16, 32
"""What rows and columns of a product on a CPU are filled up to multiples of. Found by trying: with columns
of 16 some float64 products still gave other bits with other numbers of threads.
"""


def linear(x: Tensor, weight_OK: Tensor, bias_O: Tensor) -> Tensor:
    """x [..., K] @ weight.T + bias, with the same bits for any number of threads.

    Libraries for CPUs share out the rows and columns of a product among threads, and sum an odd rest in
    another order than the body. Filled up with zeros, the shares have no such rest.
    """
    shape, columns = x.shape[:-1], len(weight_OK)
    rows = shape.numel()
    if x.device.type != "cpu" or rows % ROW_GRAIN == columns % COLUMN_GRAIN == 0:
        return F.linear(x, weight_OK, bias_O)
    # Under its old name, so that what is not filled up is freed.
    x = _filled(x.reshape(rows, -1), ROW_GRAIN)
    y_LO = F.linear(x, _filled(weight_OK, COLUMN_GRAIN), _filled(bias_O, COLUMN_GRAIN))
    # A copy, so that keys and values that are kept do not keep the filling too.
    return y_LO[:rows, :columns].clone().view(*shape, columns)


def _filled(x: Tensor, grain: int) -> Tensor:
    """With zeros behind the first dimension, up to a multiple of `grain`."""
    missing = -len(x) % grain
    return F.pad(x, (0, 0) * (x.ndim - 1) + (0, missing)) if missing else x


class Linear(nn.Linear):
    """A linear layer whose bits do not depend on the number of threads."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """The projections around an attention. Queries and keys are normalised over all heads at once."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(dim, dim)
        self.k = Linear(dim, dim)
        self.v = Linear(dim, dim)
        self.o = Linear(dim, dim)
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

    Takes latents in the dtype of the weights and leaves out what does not fill a patch. A matrix product of
    patches, in float64 and rounded once: libraries share out a convolution among threads so that it shows in
    the bits.
    """
    x_CFHW = x_CFHW.to(conv.weight.dtype)
    # Each axis becomes two, (patch, place in the patch), so that the next one is two further.
    for axis, size in zip((1, 3, 5), conv.kernel_size, strict=True):
        count = x_CFHW.shape[axis] // size
        x_CFHW = x_CFHW.narrow(axis, 0, count * size).unflatten(axis, (count, size))
    patches_LK = x_CFHW.permute(1, 3, 5, 0, 2, 4, 6).flatten(3).flatten(0, 2)
    assert conv.bias is not None
    tokens_LD = linear(patches_LK.double(), conv.weight.flatten(1).double(), conv.bias.double())
    return tokens_LD.to(conv.weight.dtype)[None]


def linear_float32(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer in float32, whatever the dtype of its weights."""
    return linear(x.float(), layer.weight.float(), layer.bias.float())


def modulated_norm(x_BLD: Tensor, scale_D: Tensor, shift_D: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift in float32: a LayerNorm whose weight and bias are the modulation."""
    return F.layer_norm(x_BLD.float(), scale_D.shape, 1 + scale_D, shift_D, eps)
