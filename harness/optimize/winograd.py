"""3 x 3 convolutions by Winograd's minimal filtering, with fewer products of channels per pixel.

A direct convolution takes 9. Here it is 4, or 2.25 in larger tiles, and 2.25 after a nearest upsampling by 2.

F(2 x 2, 3 x 3) and F(4 x 4, 3 x 3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016),
section 4: a tile of outputs is A' [(G g G') * (B' d B)] A, with the filter g and the inputs d around the tile. In
float32 the small tile has about a third of the error of a direct convolution by oneDNN, which adds more numbers. The
large tile has about as much error as that if it interpolates at 0, 2/3, -2/3, 3/2, -3/2 and infinity. At the paper's
points 0, 1, -1, 2, -2 and infinity it has twice as much. Barabasz et al., "Error Analysis and Improving the Accuracy of
Winograd Convolution for Deep Neural Networks" (2020), is about the choice of points.

Shapes: B batch, C input and K output channels, H rows and W columns of the input, h and w those of a band's tiles, s
the rows (and the columns) of a transformed tile: 6, 4, or 3 after an upsampling.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

NEAR, FAR = 2 / 3, 3 / 2
"""The points of the large tile that have both signs; their product is 1."""
BAND_BYTES = 8 << 20
"""The approximate size of a band's transformed tiles, so that they are still in a cache when they are multiplied."""


class WinogradConv2d(nn.Module):
    """A 3 x 3 convolution with stride 1 and zero padding, computed in float32 or better.

    Args:
        conv: the convolution to replace. A large tile takes 4 times its weights, another 1.8 times, after an upsampling
            1.
        step: rows of the input from one tile to the next: 4, 2, or 1 if the input is to be upsampled first, which is
            then part of this module.
    """

    def __init__(self, conv: nn.Conv2d, step: int) -> None:
        super().__init__()
        self.step = step
        rows = filter_rows(step)
        filters = torch.einsum("ia,kcab,jb->jick", rows, conv.weight.detach().double(), rows)
        self.filters_ssCK = filters.to(torch.promote_types(conv.weight.dtype, torch.float32)).contiguous()
        self.bias = conv.bias

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return (B, K, H, W), after an upsampling (B, K, 2 H, 2 W); in memory the channels are last."""
        B, _, H, W = x_BCHW.shape
        step, tile = self.step, max(2, self.step)
        h, w = -(-H // step), -(-W // step)
        band = Band(self.filters_ssCK, step, h, w)
        y_BHWK = self.filters_ssCK.new_empty(B, tile * h, tile * w, self.filters_ssCK.shape[-1])
        for x_HWC, y_HWK in zip(x_BCHW.permute(0, 2, 3, 1), y_BHWK, strict=True):
            for row in range(0, h, band.rows):
                band.convolve(x_HWC, y_HWK, min(row, h - band.rows), self.bias)
        return y_BHWK[:, : tile * H // step, : tile * W // step].permute(0, 3, 1, 2).to(x_BCHW.dtype)


class Band:
    """Some rows of tiles at a time, and the memory in which they are transformed.

    Args:
        filters_ssCK: the transformed filters, by the column and the row of a tile.
        step: rows of the input from one tile to the next.
        h: rows of tiles in an image.
        w: tiles in a row.
    """

    def __init__(self, filters_ssCK: Tensor, step: int, h: int, w: int) -> None:
        s, _, C, K = filters_ssCK.shape
        most = max(1, BAND_BYTES // (4 * s * s * w * max(C, K)))
        self.rows = -(-h // -(-h // most))
        self.filters_ssCK, self.step = filters_ssCK, step
        lines, columns = (step * (tiles - 1) + s for tiles in (self.rows, w))
        self.padded_HWC = filters_ssCK.new_zeros(lines, columns, C)
        self.rows_shWC = filters_ssCK.new_empty(s, self.rows, columns, C)
        self.tiles_sshwC = filters_ssCK.new_empty(s, s, self.rows, w, C)
        self.products_sshwK = filters_ssCK.new_empty(s, s, self.rows, w, K)
        self.spare_shwK = filters_ssCK.new_empty(s, self.rows, w, K)

    def convolve(self, x_HWC: Tensor, y_HWK: Tensor, row: int, bias: Tensor | None) -> None:
        """Convolve the band that begins at a row of tiles.

        Args:
            x_HWC: the whole input.
            y_HWK: the whole output; the band is written into it.
            row: the first row of tiles.
            bias: the bias, (K,).
        """
        tile, m_sshwK = max(2, self.step), self.products_sshwK
        self._pad(x_HWC, self.step * row - 1)
        _transform(self.padded_HWC, self.rows_shWC, self.step)
        _transform(self.rows_shWC.movedim(2, 0), self.tiles_sshwC.movedim(3, 1), self.step)
        tiles, filters, products = (
            t.flatten(2, -2).flatten(0, 1) for t in (self.tiles_sshwC, self.filters_ssCK, m_sshwK)
        )
        torch.bmm(tiles, filters, out=products)
        y_HWK = y_HWK[tile * row : tile * (row + self.rows)]
        columns = [m_sshwK[i] for i in ((0, 2, 1, 5) if tile == 4 else (0, 1))]
        _combine(m_sshwK, self.spare_shwK, columns)
        for i, m_shwK in enumerate(columns):
            _combine(m_shwK, self.spare_shwK[0], [y_HWK[j::tile, i::tile] for j in range(tile)])
        if bias is not None:
            y_HWK += bias

    def _pad(self, x_HWC: Tensor, top: int) -> None:
        """Copy the input from a row on, with zeros outside of it."""
        H, W, _ = x_HWC.shape
        first, last = max(0, top), min(H, top + self.padded_HWC.shape[0])
        self.padded_HWC[: first - top] = 0
        self.padded_HWC[first - top : last - top, 1 : W + 1] = x_HWC[first:last]
        self.padded_HWC[last - top :] = 0


def _transform(x: Tensor, out: Tensor, step: int) -> None:
    """Apply the paper's B' along the first dimension, where tiles of 6, 4 or 3 begin at every step of 4, 2 or 1."""
    tiles = (x.shape[0] - len(out)) // step + 1
    d = [x[i : i + step * (tiles - 1) + 1 : step] for i in range(len(out))]
    if step == 1:
        torch.sub(d[0], d[1], out=out[0])
        out[1].copy_(d[1])
        torch.sub(d[1], d[2], out=out[2])
        return
    if step == 2:
        torch.sub(d[0], d[2], out=out[0])
        torch.add(d[1], d[2], out=out[1])
        torch.sub(d[2], d[1], out=out[2])
        torch.sub(d[1], d[3], out=out[3])
        return
    even, odd = out[0], out[5]  # used as scratch until they are written
    for i, point, other in ((1, NEAR, FAR), (3, FAR, NEAR)):
        torch.sub(d[4], d[2], alpha=other**2, out=even)
        torch.sub(d[3], d[1], alpha=other**2, out=odd)
        torch.add(even, odd, alpha=point, out=out[i])
        torch.sub(even, odd, alpha=point, out=out[i + 1])
    for i in (0, 1):
        torch.sub(d[i + 4], d[i + 2], alpha=NEAR**2 + FAR**2, out=out[5 * i])
        out[5 * i].add_(d[i])


def _combine(m: Tensor, spare: Tensor, out: Sequence[Tensor]) -> None:
    """Apply the paper's A' along dimension 0 of m, which is overwritten; outputs may be parts of m, in this order."""
    if len(m) < 6:
        if len(m) == 4:
            m[0].add_(m[1])
            m[1].sub_(m[2])
        torch.add(m[0], m[-2], out=out[0])
        torch.sub(m[1], m[-1], out=out[1])
        return
    torch.sub(m[1], m[2], out=spare)
    m[1].add_(m[2])
    torch.sub(m[3], m[4], out=m[2])
    m[3].add_(m[4])
    near, far, nears, fars = spare, m[2], m[1], m[3]  # differences and sums over both signs
    torch.add(m[0].add_(nears), fars, out=out[0])
    torch.add(m[5].add_(near, alpha=NEAR**3), far, alpha=FAR**3, out=out[3])
    torch.add(near.mul_(NEAR), far, alpha=FAR, out=out[1])
    torch.add(nears.mul_(NEAR**2), fars, alpha=FAR**2, out=out[2])


def filter_rows(step: int) -> Tensor:
    """Return the paper's G for a step of 4, 2 or 1.

    Upsampled rows are p, q, q, r. F(2, 3) makes p - q, 2 q, q - q and q - r of them, so that it has 3 rows with q once.

    Args:
        step: rows of the input from one tile to the next.

    Returns:
        The matrix, (s, 3) in float64.
    """
    if step == 1:
        rows = [(1.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.0, 0.0, 1.0)]
    elif step == 2:
        rows = [(1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0)]
    else:
        rows = [(1.0, 0.0, 0.0)]
        for point, other in ((NEAR, FAR), (FAR, NEAR)):
            scale = 1 / (2 * point**2 * (point**2 - other**2))
            rows += [(scale, sign * point * scale, point**2 * scale) for sign in (1, -1)]
        rows += [(0.0, 0.0, 1.0)]
    return torch.tensor(rows, dtype=torch.float64)
