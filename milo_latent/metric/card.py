"""The model card beside a saved metric: what it measures, in which space, in which direction."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData

from milo_latent.files import write_atomically

if TYPE_CHECKING:
    from milo_latent.metric.network import MILO

TEMPLATE = """\
---
{metadata}
---

# {title}

A MILO metric of milo_latent: `ref` and `dist` in, the visible difference out.

| | |
| --- | --- |
| input | {space}, (B, {channels}, H, W), sides of at least {smallest} |
| `metric(dist=..., ref=...)` | raw error, (B,): 0 = identical, unbounded above; lower is better |
| `metric.compare(...).quality` | (B,): 0 = identical, towards 1 = worst |
| levels | {levels} |
| parameters | {parameters:,} |
{files}

```python
from milo_latent import MILO

metric = MILO.from_pretrained("this folder")
error = metric(dist=dist, ref=ref)  # {comment}
```

On what data and by which command these weights were made, how well they agree with people, and under which licence they
may be used, is for whoever made them to add here.
"""


def write_card(metric: MILO, folder: Path) -> None:
    """Write `README.md` into the folder of a saved metric; in one of ours that is there the hashes are renewed.

    Args:
        metric: the metric.
        folder: where its weights are.
    """
    path = folder / "README.md"
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.safetensors"))}
    if path.exists():
        before = after = path.read_bytes()  # anyone's, in whatever encoding
        for file, digest in hashes.items():
            row = rf"(\| SHA-256 of `{re.escape(file)}` \| `)[0-9a-f]{{64}}(?=`)".encode()
            after = re.sub(row, rf"\g<1>{digest}".encode(), after)
        if after != before:
            write_atomically(path, lambda partial: partial.write_bytes(after))
        return
    config, latents = metric.config, metric.config.channels != 3
    name, factor = config.latent_space or "unnamed", config.scaling_factor
    scale = "" if factor is None else f", times the scaling factor {factor:g}"
    data = ModelCardData(
        library_name="diffusers", tags=["image-quality-assessment", "perceptual-metric", "milo", "milo_latent"]
    )
    content = TEMPLATE.format(
        metadata=data.to_yaml(),
        title="MILO_L, for latents" if latents else "MILO_I, for images",
        space=f"latents of the autoencoder `{name}`{scale}" if latents else "RGB images in [0, 1]",
        channels=config.channels,
        smallest=2**config.levels,
        levels=config.levels,
        parameters=sum(parameter.numel() for parameter in metric.parameters()),
        files="\n".join(f"| SHA-256 of `{file}` | `{digest}` |" for file, digest in hashes.items()),
        comment="(B,), 0 = identical, lower is better",
    )
    ModelCard(content).save(path)
