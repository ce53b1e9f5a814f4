"""Prompts to embeddings, each text encoded once."""

from __future__ import annotations

import json
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

CACHED_PROMPTS = 64


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
            text_encoder: CLIP text model; another one than before empties the cache. None takes `stored` embeddings
                and those kept.
            tokenizer: its tokenizer, or None likewise.
            device: to encode on.

        Raises:
            ValueError: for a prompt that is not stored, without a text encoder.
        """
        if text_encoder is None or tokenizer is None:
            kept = {text: embeds[None] for (text, _), embeds in self._kept.items()} | self.stored
            missing = [text for text in texts if text not in kept]
            if missing:
                raise ValueError(
                    f"This pipeline has no text encoder for {missing[0]!r}. Pass `prompt_embeds` and "
                    f"`negative_prompt_embeds`{', or a stored prompt' if self.stored else ''}."
                )
            return torch.cat([kept[text].to(device) for text in texts])
        known = None if self._encoder is None else self._encoder()
        if known is None or known is not text_encoder or text_encoder.training:
            self.clear()
            self._encoder = weakref.ref(text_encoder)
        dtype = text_encoder.dtype
        embeds = {text: self._kept[text, dtype] for text in texts if (text, dtype) in self._kept}
        new = [text for text in dict.fromkeys(texts) if text not in embeds]
        if new:
            embeds |= dict(zip(new, encode_texts(new, text_encoder, tokenizer, device), strict=True))
        for text in dict.fromkeys(texts):
            self._kept[text, dtype] = embeds[text].detach().cpu()
            self._kept.move_to_end((text, dtype))
        while len(self._kept) > self.size:
            self._kept.popitem(last=False)
        return torch.stack([embeds[text].to(device) for text in texts])


def encode_texts(texts: list[str], text_encoder: Any, tokenizer: Any, device: torch.device) -> Tensor:
    """Return the encoder's last hidden state for texts padded and cut to the model's length, (B, tokens, width)."""
    return text_encoder(tokens_of(texts, tokenizer).to(device))[0]


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


def listed(text: str | Sequence[str] | None) -> list[str]:
    """Return prompts as a list; None is the empty prompt."""
    return [text or ""] if text is None or isinstance(text, str) else list(text)


def repeat_prompts(embeds: Tensor, num_images: int, num_images_per_prompt: int) -> Tensor:
    """Give each image its prompt, and each of its results.

    Args:
        embeds: (1 or num_images, tokens, width).
        num_images: the number of images.
        num_images_per_prompt: the number of results for each.

    Returns:
        (num_images * num_images_per_prompt, tokens, width).

    Raises:
        ValueError: for another number of prompts.
    """
    if embeds.shape[0] not in (1, num_images):
        raise ValueError(f"Expected 1 or {num_images} prompts, one for each image, got {embeds.shape[0]}.")
    each = embeds if embeds.shape[0] == num_images else embeds.expand(num_images, -1, -1)
    return each.repeat_interleave(num_images_per_prompt, dim=0)
