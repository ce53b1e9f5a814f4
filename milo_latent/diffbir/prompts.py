"""Prompts to embeddings: each text encoded once, and the official default prompts without a tokenizer."""

from __future__ import annotations

import contextlib
import json
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from milo_latent.checks import shortened
from milo_latent.diffbir.versions import NEGATIVE_PROMPT, NEGATIVE_PROMPT_V2, PROMPT
from milo_latent.files import write_safetensors
from milo_latent.structure import read_safetensors

CACHED_PROMPTS = 64
PROMPT_LENGTH = 77
PROMPT_EMBEDS_FILE = "prompt_embeds.safetensors"
_START, _END = 49406, 49407

# fmt: off
PROMPT_TOKENS: Mapping[str, tuple[int, ...]] = {  # of CLIP
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
}
# fmt: on


class PromptCache:
    """Keeps the embeddings of the prompts used last, so that a folder of images encodes its prompt once.

    Args:
        size: the most texts kept.
    """

    def __init__(self, size: int = CACHED_PROMPTS) -> None:
        self.size = size
        self.stored: dict[str, Tensor] = {}  # embeddings, (1, tokens, width), that need no text encoder
        self._encoder: weakref.ReferenceType[Any] | None = None  # of the embeddings kept; weak, so that it can go
        self._kept: OrderedDict[tuple[str, torch.dtype], Tensor] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold: not what was encoded, which belongs to this process's encoder."""
        return {"size": self.size, "stored": self.stored, "_encoder": None, "_kept": OrderedDict()}

    def clear(self) -> None:
        """Forget all embeddings: after the text encoder's weights were changed in place."""
        self._kept.clear()

    def encode(self, texts: list[str], text_encoder: Any, tokenizer: Any, device: torch.device) -> Tensor:
        """Return embeddings, (len(texts), tokens, width), of the encoder's last hidden state.

        Args:
            texts: prompts.
            text_encoder: CLIP text model; another one than before empties the cache. Without it, or without tokenizer,
                the `stored` embeddings and those kept are taken.
            tokenizer: of the text encoder.
            device: to encode on.

        Raises:
            ValueError: for a prompt that is not stored, without a text encoder.
        """
        if text_encoder is None or tokenizer is None:
            return torch.cat([each.to(device) for each in self._recall(texts)])
        known = None if self._encoder is None else self._encoder()
        changing = text_encoder.training or getattr(text_encoder, "peft_config", None)  # a LoRA can be scaled
        if known is None or known is not text_encoder or changing:
            self.clear()
            self._encoder = weakref.ref(text_encoder)
        dtype = text_encoder.dtype
        embeds = {text: self._kept[text, dtype] for text in texts if (text, dtype) in self._kept}
        new = [text for text in dict.fromkeys(texts) if text not in embeds]
        if new:
            encoded = text_encoder(tokens_of(new, tokenizer).to(device))[0]  # (len(new), tokens, width)
            embeds |= dict(zip(new, encoded, strict=True))
        for text in () if changing else dict.fromkeys(texts):
            self._kept[text, dtype] = embeds[text].detach().cpu()
            self._kept.move_to_end((text, dtype))
        while len(self._kept) > self.size:
            self._kept.popitem(last=False)
        return torch.stack([embeds[text].to(device) for text in texts])

    def _recall(self, texts: list[str]) -> list[Tensor]:
        kept = {text: embeds[None] for (text, _), embeds in self._kept.items()} | self.stored
        missing = [text for text in texts if text not in kept]
        if missing:
            raise ValueError(
                f"This pipeline has no text encoder for {missing[0]!r}. Pass `prompt_embeds` and "
                f"`negative_prompt_embeds`{', or a stored prompt' if self.stored else ''}."
            )
        return [kept[text] for text in texts]


@contextlib.contextmanager
def scaled_lora(text_encoder: Any, scale: float | None) -> Iterator[None]:
    """Scale the LoRA of a text encoder, if it has one, by a factor for a while; None leaves it as it is."""
    if scale is None or not getattr(text_encoder, "peft_config", None):
        yield
        return
    from diffusers.utils import scale_lora_layers, unscale_lora_layers

    scale_lora_layers(text_encoder, scale)
    try:
        yield
    finally:
        unscale_lora_layers(text_encoder, scale)


def tokens_of(texts: list[str], tokenizer: Any) -> Tensor:
    """Return tokens padded and cut to the model's length, (B, tokens).

    Stable Diffusion 2's tokenizer pads with "!", CLIP's token 0, and so reads every exclamation mark as padding; here
    it is read as the word that it is (256, as DiffBIR's own code reads it).
    """
    length, mark = tokenizer.model_max_length, getattr(tokenizer, "pad_token", None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or mark is None or mark.startswith("<|") or not any(mark in text for text in texts):
        return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    content = json.loads(backend.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != mark]
    plain = Tokenizer.from_str(json.dumps(content))
    plain.enable_truncation(length)
    plain.enable_padding(length=length, pad_id=tokenizer.pad_token_id, pad_token=mark)
    return torch.tensor([encoding.ids for encoding in plain.encode_batch(texts)])


def prompt_tokens(prompts: Iterable[str] = PROMPT_TOKENS) -> Tensor:
    """Return official default prompts as CLIP's tokens, (prompts, 77), padded with token 0.

    Raises:
        KeyError: for any other prompt; it needs a tokenizer.
    """
    rows = [(_START, *PROMPT_TOKENS[prompt], _END) for prompt in prompts]
    return torch.tensor([row + (0,) * (PROMPT_LENGTH - len(row)) for row in rows])


def listed(text: str | Sequence[str] | None) -> list[str]:
    """Return prompts as a list; None is the empty prompt."""
    return [text or ""] if text is None or isinstance(text, str) else list(text)


def repeat_prompts(embeds: Tensor, num_images: int, num_images_per_prompt: int) -> Tensor:
    """Repeat embeddings, (1 or images, tokens, ..., width), for each result, (images * results for each, ...).

    Raises:
        ValueError: for another number of prompts.
    """
    if embeds.shape[0] not in (1, num_images):
        raise ValueError(f"Expected 1 or {num_images} prompts, one for each image, got {embeds.shape[0]}.")
    each = embeds if embeds.shape[0] == num_images else embeds.expand(num_images, *embeds.shape[1:])
    return each.repeat_interleave(num_images_per_prompt, dim=0)


def repeat_image_prompts(
    embeds: Sequence[Tensor], num_images: int, num_images_per_prompt: int, *, guided: bool
) -> list[tuple[Tensor | None, Tensor]]:
    """Repeat the image embeddings of IP-adapters for each result.

    Args:
        embeds: one for each adapter, (1 or images, pictures, ..., width); with classifier-free guidance twice as many,
            those of the negative prompt first, as diffusers' pipelines take them.
        num_images: the number of images.
        num_images_per_prompt: the number of results for each of them.
        guided: whether classifier-free guidance is on.

    Returns:
        For each adapter, the negative ones, or None, and the others, (results, pictures, ..., width) each.

    Raises:
        ValueError: for another shape or number.
    """
    pairs: list[tuple[Tensor | None, Tensor]] = []
    for each in embeds:
        if each.ndim < 3 or (guided and each.shape[0] % 2):
            raise ValueError(
                "Expected `ip_adapter_image_embeds` of shape (images, pictures, ..., width), with classifier-free "
                f"guidance (2 * images, pictures, ..., width), the negative ones first, got {tuple(each.shape)}."
            )
        *negative, positive = (
            repeat_prompts(half, num_images, num_images_per_prompt) for half in each.chunk(1 + guided)
        )
        pairs.append((negative[0] if negative else None, positive))
    return pairs


def read_prompt_embeds(folder: str | Path) -> dict[str, Tensor]:
    """Return the stored prompts of a pipeline folder, text to (1, 77, width); none where it has a tokenizer."""
    path = Path(folder) / PROMPT_EMBEDS_FILE
    stored = read_safetensors(path) if path.is_file() else {}
    for text, embeds in stored.items():
        if embeds.ndim != 2 or not embeds.is_floating_point():
            shape = f"{tuple(embeds.shape)} {embeds.dtype}"
            raise ValueError(f"Expected embeddings (tokens, width) in {path}, got {shape} for {shortened(text)!r}.")
    return {text: embeds[None] for text, embeds in stored.items()}


def write_prompt_embeds(folder: str | Path, stored: Mapping[str, Tensor]) -> None:
    """Write what `read_prompt_embeds` reads, if there is any; `folder` is made if need be.

    Raises:
        OSError: if the disk is full.
    """
    if stored:
        Path(folder).mkdir(parents=True, exist_ok=True)
        embeds = {text: each[0] for text, each in stored.items()}
        write_safetensors(Path(folder) / PROMPT_EMBEDS_FILE, embeds)
