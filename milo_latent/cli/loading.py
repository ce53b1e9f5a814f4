"""What several commands share."""

from __future__ import annotations


def hide_loading_bar() -> None:
    """Leave the bar of the denoising steps as the only one."""
    from diffusers.utils import logging

    logging.disable_progress_bar()
