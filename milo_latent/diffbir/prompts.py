"""The official default prompts as tokens, so that they can be encoded where there is no tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from milo_latent.diffbir.versions import NEGATIVE_PROMPT, NEGATIVE_PROMPT_V2, PROMPT
from milo_latent.files import write_atomically

PROMPT_LENGTH = 77
PROMPT_EMBEDS_FILE = "prompt_embeds.safetensors"
_START, _END = 49406, 49407

# fmt: off
PROMPT_TOKENS: Mapping[str, tuple[int, ...]] = MappingProxyType({
    "": (),
    PROMPT: (
        25602, 267, 1400, 18501, 267, 5302, 12609, 267, 2807, 1996, 320, 9310, 17805, 337, 3934, 267, 22146, 12609,
        1125, 268, 16157, 13162, 7657, 267, 274, 273, 330, 267, 3140, 19016, 267, 8118, 4414, 267, 8331, 613, 890, 4281,
        23163, 267, 3575, 28267, 23163, 267, 22146, 17126, 1294, 267, 1878, 2193, 561, 37715, 269,
    ),
    NEGATIVE_PROMPT: (
        3086, 267, 2870, 3086, 267, 6052, 267, 3610, 267, 794, 267, 5269, 267, 2870, 3086, 267, 7651, 267, 14740, 1844,
        267, 274, 323, 13024, 267, 15636, 5857, 267, 12102, 2540, 267, 7615, 267, 15987, 267, 5719, 3027, 267, 1042,
        3027, 267, 15479, 267, 2505, 2110, 267, 9189, 267, 73, 11207, 30249, 267, 561, 6528, 267, 1049, 934, 267, 962,
        268, 8990, 269,
    ),
    NEGATIVE_PROMPT_V2: (
        1042, 3027, 267, 21977, 267, 1042, 268, 9977, 267, 33495, 267, 569, 8157, 267, 5613, 28063,
    ),
})
# fmt: on


def prompt_tokens(prompts: Iterable[str] = PROMPT_TOKENS) -> Tensor:
    """Return official default prompts as CLIP's tokens, (prompts, 77), padded with token 0.

    Raises:
        KeyError: for any other prompt; it needs a tokenizer.
    """
    rows = [(_START, *PROMPT_TOKENS[prompt], _END) for prompt in prompts]
    return torch.tensor([row + (0,) * (PROMPT_LENGTH - len(row)) for row in rows])


def read_prompt_embeds(folder: str | Path) -> dict[str, Tensor]:
    """Read the embeddings of default prompts that a pipeline folder without a tokenizer holds.

    Args:
        folder: of the pipeline.

    Returns:
        Prompt to embedding, (1, 77, width); empty where the folder has none.
    """
    path = Path(folder) / PROMPT_EMBEDS_FILE
    return {text: embeds[None] for text, embeds in load_file(path).items()} if path.is_file() else {}


def write_prompt_embeds(folder: str | Path, stored: Mapping[str, Tensor]) -> None:
    """Write what `read_prompt_embeds` reads; nothing where nothing is stored.

    Args:
        folder: of the pipeline, made if need be.
        stored: prompt to embedding, (1, 77, width).

    Raises:
        OSError: if the disk is full.
    """
    if stored:
        Path(folder).mkdir(parents=True, exist_ok=True)
        embeds = {text: each[0].cpu().contiguous() for text, each in stored.items()}
        write_atomically(Path(folder) / PROMPT_EMBEDS_FILE, lambda partial: save_file(embeds, partial))
