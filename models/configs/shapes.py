"""Names and shapes of layers, from which a network's expected tensors are listed without torch."""

from __future__ import annotations

from collections.abc import Iterable

from models.files import Shape


class TensorShapes(dict[str, Shape]):
    """The shape of each tensor of a network, by published name."""

    def linear(self, name: str, channels: int, out: int, bias: bool = True) -> None:
        """Add a linear layer."""
        self[f"{name}.weight"] = (out, channels)
        if bias:
            self[f"{name}.bias"] = (out,)

    def conv(self, name: str, channels: int, out: int, *sides: int) -> None:
        """Add a convolution with a bias."""
        self[f"{name}.weight"] = (out, channels, *sides)
        self[f"{name}.bias"] = (out,)

    def norm(self, name: str, channels: int) -> None:
        """Add a norm with a gain and a bias."""
        self[f"{name}.weight"] = self[f"{name}.bias"] = (channels,)

    def gains(self, names: Iterable[str], channels: int) -> None:
        """Add RMS norms."""
        for name in names:
            self[f"{name}.weight"] = (channels,)

    def embedder(self, name: str, channels: int, width: int) -> None:
        """Add an MLP of two linear layers, linear_1 and linear_2."""
        self.linear(f"{name}.linear_1", channels, width)
        self.linear(f"{name}.linear_2", width, width)

    def projections(self, names: Iterable[str], width: int, bias: bool = True) -> None:
        """Add linear layers from a width to the same width."""
        for name in names:
            self.linear(name, width, width, bias)

    def attention(self, name: str, width: int, bias: bool = True) -> None:
        """Add the four linear layers of an attention layer."""
        self.projections((f"{name}.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")), width, bias)

    def feed_forward(self, name: str, width: int, hidden: int | None = None) -> None:
        """Add a feed-forward layer, of four times the width if no other is given."""
        self.linear(f"{name}.net.0.proj", width, hidden or 4 * width)
        self.linear(f"{name}.net.2", hidden or 4 * width, width)

    def joint_attention(self, name: str, width: int, head_norm: int | None, last: bool = False) -> None:
        """Add an attention layer over image and text.

        Args:
            name: The layer's name.
            width: The number of channels of a token.
            head_norm: The number of channels per head, if queries and keys have RMS norms; None if they have none.
            last: Whether the text has no output.
        """
        self.attention(name, width)
        self.projections((f"{name}.{part}" for part in ("add_q_proj", "add_k_proj", "add_v_proj")), width)
        if not last:
            self.linear(f"{name}.to_add_out", width, width)
        if head_norm is not None:
            norms = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
            self.gains((f"{name}.{norm}" for norm in norms), head_norm)
