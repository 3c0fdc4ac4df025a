"""3 x 3 convolutions by Winograd's minimal filtering: 4 products of channels for a pixel in place of 9, and, behind a
nearest upsampling by 2, 9 for four pixels in place of 36.

F(2 x 2, 3 x 3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016), section 4.1: a tile of
2 x 2 outputs is A' [(G g G') * (B' d B)] A, of the filter g and the 4 x 4 inputs d around the tile. It adds fewer
numbers than a direct convolution does, and in float32 is about as accurate.

Shapes: B batch, C input and K output channels, H rows and W columns of the input, h and w those of a band's tiles, s
the rows (and the columns) of a transformed tile: 4, or 3 behind an upsampling.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

FILTER = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
"""G of the paper."""
BAND_BYTES = 8 << 20
"""About what a band's transformed tiles take, so that they are still in a cache when they are multiplied."""


class WinogradConv2d(nn.Module):
    """A convolution of 3 x 3 with stride 1 and zeros around the picture.

    Args:
        conv: whose weights it takes.
        upsampled: whether it is handed what was to be upsampled first, and does that too.
    """

    def __init__(self, conv: nn.Conv2d, upsampled: bool = False) -> None:
        super().__init__()
        self.upsampled = upsampled
        rows = torch.tensor(FILTER, dtype=torch.float64)
        if upsampled:  # a tile's inputs are p, q, q, r: transformed p - q, 2 q, q - q, q - r
            rows = rows[[0, 1, 3]] * torch.tensor([[1.0], [2.0], [1.0]], dtype=torch.float64)
        filters = torch.einsum("ia,kcab,jb->jick", rows, conv.weight.detach().double(), rows)
        self.filters_sCK = filters.flatten(0, 1).to(conv.weight.dtype).contiguous()
        self.bias = conv.bias

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, K, H, W), behind an upsampling (B, K, 2 H, 2 W); in memory the channels are innermost."""
        B, _, H, W = x_BCHW.shape
        step = 1 if self.upsampled else 2
        tiles = -(-H // step), -(-W // step)
        y_BHWK = x_BCHW.new_empty(B, 2 * tiles[0], 2 * tiles[1], self.filters_sCK.shape[-1])
        band = Band(self.filters_sCK, self.bias, *tiles, step)
        for x_HWC, y_HWK in zip(x_BCHW.permute(0, 2, 3, 1), y_BHWK, strict=True):
            for row in range(0, tiles[0], band.rows):
                band.convolve(x_HWC, y_HWK, min(row, tiles[0] - band.rows))
        return y_BHWK[:, : 2 * H // step, : 2 * W // step].permute(0, 3, 1, 2)


class Band:
    """Some rows of tiles at a time, and the memory in which they are transformed.

    Args:
        filters_sCK: transformed, those of a tile's columns before those of its rows.
        bias: (K,) or None.
        tiles_H: rows of tiles.
        tiles_W: tiles of a row.
        step: rows of the input from one tile to the next: 2, or 1 where it is upsampled.
    """

    def __init__(self, filters_sCK: Tensor, bias: Tensor | None, tiles_H: int, tiles_W: int, step: int) -> None:
        tile, C, K = filters_sCK.shape
        s, most = (4 if step == 2 else 3), max(1, BAND_BYTES // (4 * tile * tiles_W * max(C, K)))
        self.rows = -(-tiles_H // -(-tiles_H // most))
        self.filters_sCK, self.bias, self.step = filters_sCK, bias, step
        lines, columns = (step * (tiles - 1) + s for tiles in (self.rows, tiles_W))
        self.padded_HWC = filters_sCK.new_zeros(lines, columns, C)
        self.rows_shWC = filters_sCK.new_empty(s, self.rows, columns, C)
        self.tiles_sshwC = filters_sCK.new_empty(s, s, self.rows, tiles_W, C)
        self.products_sshwK = filters_sCK.new_empty(s, s, self.rows, tiles_W, K)

    def convolve(self, x_HWC: Tensor, y_HWK: Tensor, row: int) -> None:
        """Writes what becomes of the band that begins at a row of tiles."""
        self._pad(x_HWC, self.step * row - 1)
        _transform(self.padded_HWC, self.rows_shWC.unbind())
        _transform(self.rows_shWC.movedim(2, 0), self.tiles_sshwC.movedim(3, 1).unbind())
        m_sshwK = self.products_sshwK
        torch.bmm(
            self.tiles_sshwC.flatten(2, 3).flatten(0, 1), self.filters_sCK, out=m_sshwK.flatten(2, 3).flatten(0, 1)
        )
        if self.bias is not None:
            m_sshwK[1, 1] += self.bias  # counts once in each of a tile's outputs
        _combine(m_sshwK.unbind(), m_sshwK[:2].unbind())
        y_HWK = y_HWK[2 * row : 2 * (row + self.rows)]
        for column, m_shwK in enumerate(m_sshwK[:2]):
            _combine(m_shwK.unbind(), [y_HWK[0::2, column::2], y_HWK[1::2, column::2]])

    def _pad(self, x_HWC: Tensor, top: int) -> None:
        """The input from a row on, with zeros where there is none."""
        H, W, _ = x_HWC.shape
        first, last = max(0, top), min(H, top + self.padded_HWC.shape[0])
        self.padded_HWC[: first - top] = 0
        self.padded_HWC[first - top : last - top, 1 : W + 1] = x_HWC[first:last]
        self.padded_HWC[last - top :] = 0


def _transform(x: Tensor, out: Sequence[Tensor]) -> None:
    """B' of the paper over the first dimension, from which tiles take 4 with a step of 2, or 3 with one of 1."""
    if len(out) == 3:
        before, here, after = x[:-2], x[1:-1], x[2:]
        torch.sub(before, here, out=out[0])
        out[1].copy_(here)
        torch.sub(here, after, out=out[2])
        return
    a, b, c, d = x[:-2:2], x[1:-2:2], x[2::2], x[3::2]
    torch.sub(a, c, out=out[0])
    torch.add(b, c, out=out[1])
    torch.sub(c, b, out=out[2])
    torch.sub(b, d, out=out[3])


def _combine(m: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """A' of the paper over what there are 4 or 3 of; the first two are overwritten."""
    if len(m) == 4:
        m[0].add_(m[1])
        m[1].sub_(m[2])
    torch.add(m[0], m[-2], out=out[0])
    torch.sub(m[1], m[-1], out=out[1])
