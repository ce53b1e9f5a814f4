"""The model card beside a saved metric: what it measures, in which space, in which direction."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from milo_latent.atomic import write_bytes, write_text
from milo_latent.resources import sha256

TEMPLATE = """\
---
library_name: diffusers
tags: [image-quality-assessment, perceptual-metric, milo, milo_latent]
---

# {title}

A MILO metric of milo_latent: it takes `ref` and `dist`, and gives the visible difference.

| | |
| --- | --- |
| input | {space}, (B, {channels}, H, W), sides of at least {smallest} |
| `metric(dist=..., ref=...)` | error E, (B,): 0 = identical, unbounded above; lower is better |
| `metric.compare(...).mos` | 5 * (1 - S(E)), (B,), 0 to 5; higher is better |
| `metric.compare(...).error_map` | (B, 1, H, W): 0 = identical, towards 1 = worst |
| levels | {levels} |
| parameters | {parameters:,} |
{files}

```python
from milo_latent import MILO

metric = MILO.from_pretrained("this folder")
error = metric(dist=dist, ref=ref)  # (B,), 0 = identical, lower is better
```

{origin}
"""
UNKNOWN_ORIGIN = """\
On what data and by which command these weights were made, how well they agree with people, and under which licence they
may be used, is for whoever made them to add here."""


def write_card(metric: Any, folder: Path, *, origin: str | None = None) -> None:
    """Write `README.md` into the folder of a saved metric.

    `origin` tells where the weights come from; None keeps a card that is there, and renews the SHA-256 that it gives.
    """
    path = folder / "README.md"
    digests = {file.name: sha256(file) for file in sorted(folder.glob("*.safetensors"))}
    if origin is None and path.exists():
        _renew_digests(path, digests)
        return
    config = metric.config
    latents = config.channels != 3
    factor = "" if config.scaling_factor is None else f", times the scaling factor {config.scaling_factor:g}"
    name = config.latent_space or "unnamed"
    content = TEMPLATE.format(
        title="MILO_L, for latents" if latents else "MILO_I, for images",
        space=f"latents of the autoencoder `{name}`{factor}" if latents else "RGB images in [0, 1]",
        channels=config.channels,
        smallest=2**config.levels,
        levels=config.levels,
        parameters=sum(parameter.numel() for parameter in metric.parameters()),
        files="\n".join(f"| SHA-256 of `{file}` | `{digest}` |" for file, digest in digests.items()),
        origin=origin or UNKNOWN_ORIGIN,
    )
    write_text(path, content)


def _renew_digests(path: Path, digests: dict[str, str]) -> None:
    before = after = path.read_bytes()  # written by anyone, in whatever encoding
    for file, digest in digests.items():
        row = rf"(\| SHA-256 of `{re.escape(file)}` \| `)[0-9a-f]{{64}}(?=`)".encode()
        after = re.sub(row, rf"\g<1>{digest}".encode(), after)
    if after != before:
        write_bytes(path, after)
