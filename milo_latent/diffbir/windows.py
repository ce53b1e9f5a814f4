"""Attention inside square windows, plain and shifted, as SwinIR and SCUNet share it; pure functions.

N = window * window tokens a window, (r, c) windows in an image.

Source: Liu et al., "Swin Transformer", arXiv 2103.14030, section 3.2, eq. 4.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def split_windows(hidden: Tensor, window: int, shift: int = 0) -> Tensor:
    """Cut (B, H, W, C), H and W multiples of `window`, into windows, (B, r, c, N, C).

    The windows start `shift` cells down and to the right; those that leave the image continue at its other side.
    """
    batch, height, width, channels = hidden.shape
    if shift:
        hidden = hidden.roll((-shift, -shift), dims=(1, 2))
    grid = hidden.view(batch, height // window, window, width // window, window, channels)
    return grid.transpose(2, 3).reshape(batch, height // window, width // window, window * window, channels)


def join_windows(windows: Tensor, window: int, shift: int = 0) -> Tensor:
    """Undo `split_windows`: (B, r, c, N, C) to (B, H, W, C)."""
    batch, rows, columns, _, channels = windows.shape
    grid = windows.view(batch, rows, columns, window, window, channels).transpose(2, 3)
    hidden = grid.reshape(batch, rows * window, columns * window, channels)
    return hidden.roll((shift, shift), dims=(1, 2)) if shift else hidden


def position_bias(table: Tensor, window: int) -> Tensor:
    """Look up what the positions of two tokens, query and key, add to their attention, (heads, N, N).

    Args:
        table: (heads, 2 * window - 1, 2 * window - 1), by difference down and across, both plus window - 1.
        window: side of a window.
    """
    place = torch.arange(window, device=table.device)
    difference = place[:, None] - place[None, :] + window - 1  # (window, window): query, key
    bias = table[:, difference[:, None, :, None], difference[None, :, None, :]]  # (heads, query y, x, key y, x)
    return bias.flatten(3).flatten(1, 2)  # (heads, N, N)


def seam_masks(window: int, shift: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return which tokens may attend to each other in windows across the lower and the right seam, (N, N) bool each.

    A shifted window at the border joins pixels of opposite sides of the image, which must not attend to each other.
    """
    side = torch.arange(window, device=device) >= window - shift
    same = side[:, None] == side[None, :]  # (window, window): query, key
    tokens = window * window
    lower = same[:, None, :, None].expand(window, window, window, window).reshape(tokens, tokens)
    right = same[None, :, None, :].expand(window, window, window, window).reshape(tokens, tokens)
    return lower, right


def window_attention(qkv: Tensor, bias: Tensor, shift: int = 0) -> Tensor:
    """Attend inside each window, from (B, r, c, N, 3 C) to (B, r, c, N, C).

    Only windows in the last row and column span a seam, so there are four kinds of windows, each of which is attended
    at once with one bias: memory does not grow by a mask for each window.

    Args:
        qkv: queries, keys and values, each of all heads in turn.
        bias: (heads, N, N).
        shift: of the windows.
    """
    if not shift:
        return _attend(qkv, bias)
    lower, right = seam_masks(round(bias.shape[-1] ** 0.5), shift, bias.device)
    never = float("-inf")
    at_right = bias.masked_fill(~right, never)

    def attend_row(row: Tensor, inner: Tensor, last: Tensor) -> Tensor:
        return torch.cat([_attend(row[:, :, :-1], inner), _attend(row[:, :, -1:], last)], dim=2)

    upper_rows = attend_row(qkv[:, :-1], bias, at_right)
    last_row = attend_row(qkv[:, -1:], bias.masked_fill(~lower, never), at_right.masked_fill(~lower, never))
    return torch.cat([upper_rows, last_row], dim=1)


def _attend(qkv: Tensor, bias: Tensor) -> Tensor:
    batch, rows, columns, tokens, width = qkv.shape
    heads = bias.shape[0]
    parts = qkv.reshape(batch * rows * columns, tokens, 3, heads, width // (3 * heads))
    query, key, value = parts.permute(2, 0, 3, 1, 4)  # (B r c, heads, N, C / heads) each
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias[None].to(query.dtype))
    return attended.transpose(1, 2).reshape(batch, rows, columns, tokens, width // 3)
