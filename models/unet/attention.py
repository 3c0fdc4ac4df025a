"""diffusers' attention layers, computed by a kernel of this package: their projections and norms, our softmax.

Shapes: B batch, L query tokens, S key tokens, C channels, H heads, D head dimension, Y X rows and columns.
"""

from __future__ import annotations

from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from models.attention import AttentionKernel
from models.files import CheckpointError


class KernelAttention:
    """A diffusers attention processor: the layer's own projections, then kernel(q_BLHD, k_BSHD, v_BSHD, mask_BS).

    It takes tokens (B, L, C), or image features (B, C, Y, X) whose pixels are the tokens. It applies the layer's group
    norm, context norm, residual and rescaling. upcast_attention and upcast_softmax mean scores in float32, in which
    every kernel accumulates them anyway; diffusers' own AttnProcessor2_0 reads neither.
    """

    def __init__(self, kernel: AttentionKernel) -> None:
        self.kernel = kernel

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Return the layer's output, shaped like hidden_states.

        Args:
            attn: The layer.
            hidden_states: The queries' input.
            encoder_hidden_states: The keys' and values' input, (B, S, C'); None means hidden_states.
            attention_mask: The mask (B, 1, S) as UNet2DConditionModel makes it: 0 for a key to attend to, far below 0
                for another.
            temb: The time embedding; only layers with a spatial norm read it, and route_attention rejects these.
        """
        is_image = hidden_states.ndim == 4
        x_BLC = hidden_states.flatten(2).transpose(1, 2) if is_image else hidden_states
        if attn.group_norm is not None:
            x_BLC = attn.group_norm(x_BLC.transpose(1, 2)).transpose(1, 2)
        context_BSC = x_BLC if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross is not None:
            context_BSC = attn.norm_encoder_hidden_states(context_BSC)
        q, k, v = attn.to_q(x_BLC), attn.to_k(context_BSC), attn.to_v(context_BSC)
        q_BLHD, k_BSHD, v_BSHD = (y.unflatten(-1, (attn.heads, -1)) for y in (q, k, v))
        mask_BS = None if attention_mask is None else attention_mask[:, 0] == 0
        y_BLC = attn.to_out[0](self.kernel(q_BLHD, k_BSHD, v_BSHD, mask_BS).flatten(2))
        y = y_BLC.transpose(1, 2).reshape(hidden_states.shape) if is_image else y_BLC
        if attn.residual_connection:
            y = y + hidden_states
        return y / attn.rescale_output_factor


def route_attention(unet: nn.Module, kernel: AttentionKernel, origin: str) -> None:
    """Set the kernel on every attention layer of a diffusers network.

    Args:
        unet: The network.
        kernel: The attention kernel, softmax(q k^T / sqrt(D)) v.
        origin: The checkpoint's name in error messages.

    Raises:
        CheckpointError: A layer that computes something else.
    """
    processor = KernelAttention(kernel)
    for name, layer in unet.named_modules():
        if not isinstance(layer, Attention):
            continue
        unsupported = {
            "keys and values of its own (SimpleCrossAttn blocks)": layer.added_kv_proj_dim is not None,
            "a spatial norm": layer.spatial_norm is not None,
            "norms of queries and keys": layer.norm_q is not None or layer.norm_k is not None,
            "another scale than 1 / sqrt(head dimension)": not layer.scale_qk,
            "fewer heads for keys than for queries": layer.inner_kv_dim != layer.inner_dim,
        }
        if wrong := [what for what, found in unsupported.items() if found]:
            raise CheckpointError(f"{origin}: the attention layer {name} has {wrong[0]}, which is not supported")
        layer.set_processor(processor)
