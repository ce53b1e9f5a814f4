"""What a comparison by MILO gives: numbers, maps and, of these, pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from milo_latent.extras import import_extra
from milo_latent.inputs import Images, images_to_tensor
from milo_latent.metric.visualize import picture_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class MILOOutput:
    """The result of comparing a batch.

    Args:
        error: E, the mean of the visible error over pixels, (B,): 0 = identical, unbounded above, lower is better.
        mos: predicted mean opinion score, (B,), 0 to 5, higher is better: 5 * (1 - S(E)).
        mask: visibility mask M, (B, 1, H, W), in (0, levels).
        error_map: V, (B, 1, H, W): 0 = identical, towards 1 = worst.
        ref: the reference images, (B or 1, 3, H, W); None where latents were compared.
        dist: the distorted images, (B, 3, H, W); None where latents were compared.
    """

    error: Tensor
    mos: Tensor
    mask: Tensor
    error_map: Tensor
    ref: Tensor | None = field(default=None, repr=False)
    dist: Tensor | None = field(default=None, repr=False)

    def figure(
        self, *, sample: int = 0, ref: Images | None = None, dist: Images | None = None, width: float = 12.0
    ) -> Figure:
        """Draw the images, the mask and the error map side by side; each map has a color bar of its own.

        Args:
            sample: index in the batch of the pair to draw.
            ref: the reference image to show, where latents were compared, or another; a batch has one for each sample,
                or one for all. None takes the one that was compared, if images were.
            dist: the distorted image to show, in the same way.
            width: of the figure in inches.

        Returns:
            A figure, which is not shown.

        Raises:
            ImportError: without matplotlib.
            ValueError: if `sample` is not in the batch, or for images of another number.
        """
        batch = len(self.error)
        if not 0 <= sample < batch:
            raise ValueError(f"Expected `sample` in [0, {batch - 1}], got {sample}.")
        pictures = {}
        for title, given, compared in (("reference", ref, self.ref), ("distorted", dist, self.dist)):
            images = compared if given is None else images_to_tensor(given, title)
            if images is None:
                continue
            if len(images) not in (1, batch):
                raise ValueError(f"Expected 1 or {batch} {title} images, got {len(images)}.")
            pictures[title] = images[sample % len(images)][None]  # (1, 3, H, W)
        pictures["mask M"] = self.mask[sample : sample + 1]
        pictures["error map V"] = self.error_map[sample : sample + 1]
        figure = picture_grid(pictures, width=width, shared_scale=False)
        figure.suptitle(f"error {self.error[sample].item():.4f}, MOS {self.mos[sample].item():.2f}")
        return figure

    def show(
        self, *, sample: int = 0, ref: Images | None = None, dist: Images | None = None, width: float = 12.0
    ) -> None:
        """Show the figure of `figure` in a notebook or a window."""
        self.figure(sample=sample, ref=ref, dist=dist, width=width)
        import_extra("matplotlib.pyplot", "plots", "The figure").show()
