"""The fidelity dial: a small network joins what the generator decoded with what was known before. Own."""

from __future__ import annotations

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from milo_latent.diffbir.residual_cleaner import ResidualUNet
from milo_latent.diffbir.rules import DEFAULT, Rules
from milo_latent.diffbir.tiles import Tile

__all__ = ["FidelityJoin", "ModelMixin", "join_images"]  # ModelMixin: diffusers looks for it beside the class


class FidelityJoin(ResidualUNet):
    """Predict the picture that keeps all that is known: the cleaned one, and a learned residual.

    Untrained it returns the cleaned image. The learned wrapping of features in StableSR and the weight w of CodeFormer
    serve the same purpose inside their decoders; the wavelet color fix is a fixed relative.

    Args:
        channels: of the levels, from 1/2 of the size downwards.
        blocks: residual blocks of each level; all but the last level have them on the way up, too.
    """

    @register_to_config
    def __init__(self, channels: tuple[int, ...] = (24, 48), blocks: tuple[int, ...] = (1, 1)) -> None:
        super().__init__(3, channels, blocks)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]

    @property
    def multiple(self) -> int:
        """Pixels to whose multiples the network pads; tiles that start there see the same 2x2 blocks."""
        return 2 ** len(self.down_blocks)

    def forward(self, decoded: Tensor, cleaned: Tensor, degraded: Tensor) -> Tensor:
        """Join images of any size, (B, 3, H, W) each, in [0, 1]; the result may leave that range a little."""
        stack = torch.cat([decoded, cleaned, degraded], dim=1).to(self.conv_in.weight.dtype)
        return cleaned + self.residual(stack)


def join_images(
    join: FidelityJoin,
    *,
    decoded: Tensor,
    cleaned: Tensor,
    degraded: Tensor,
    fidelity: float,
    tile: Tile | None = None,
    rules: Rules = DEFAULT,
) -> Tensor:
    """Move the decoded image the share `fidelity` of its way to the joined one, (B, 3, H, W) float32.

    Args:
        join: the network, which does not run for a `fidelity` of 0.
        decoded: what the generator gave, (B, 3, H, W) float32, returned as it is for 0.
        cleaned: what the first stage gave, of the same shape.
        degraded: what was to be restored, of the same shape.
        fidelity: in [0, 1]; 1 gives exactly what the network returns.
        tile: size of the tiles that the network works in; None joins the images whole.
        rules: of compatibility.
    """
    if not fidelity:
        return decoded
    stack = torch.cat([decoded, cleaned, degraded], dim=1)  # (B, 9, H, W)
    tiles = rules.tiles(tile, stack.shape[2:], multiple=join.multiple)

    def run(images: Tensor) -> Tensor:
        return join(*images.split(3, dim=1))

    joined = run(stack) if tiles is None else tiles(run, stack)
    return torch.lerp(decoded, joined.to(decoded), fidelity)  # exact at both ends
