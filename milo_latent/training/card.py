"""The card of a trained restorer: what it was trained from, on what, by which command, with which figures."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from milo_latent.atomic import write_text
from milo_latent.training.engine.run import RunConfig

TEMPLATE = """\
---
{metadata}
---

# {title}

A restorer for [milo_latent](https://github.com/milo-latent/milo_latent), trained from `{model}`.

```bash
milo-latent restore photo.jpg --model {title} --stage all
```

| | |
| --- | --- |
| trained | {trained} |
| objective | {objective} |
| photos | {photos} |
| degradation | {degradation} |
| steps x batch | {steps} x {batch} |
| seed | {seed} |
{figures}

```bash
{command}
```
"""


def write_restorer_card(options: argparse.Namespace, config: RunConfig, figures: dict[str, float]) -> Path:
    """Write `README.md` into the trained pipeline's folder, and return that folder.

    Args:
        options: of `train_restorer`.
        config: of the run.
        figures: of the last validation, by name.
    """
    folder: Path = options.output / "pipeline"
    data = ModelCardData(
        library_name="diffusers", pipeline_tag="image-to-image", tags=["image-restoration", "diffbir", "milo"]
    )
    content = TEMPLATE.format(
        metadata=data.to_yaml(),
        title=options.output.name,
        model=options.model,
        trained=options.train + (f", rank {options.rank}" if options.train == "lora" else ""),
        objective=options.objective,
        photos=options.dataset or f"{config.data['photos']} photos",
        degradation="pairs" if options.degraded or options.degraded_column else options.degradation,
        steps=config.steps,
        batch=config.batch_size * config.accumulation,
        seed=config.seed,
        figures="\n".join(f"| validation, {name} | {value:g} |" for name, value in figures.items()),
        command=f"python -m milo_latent.training.train_restorer {shlex.join(sys.argv[1:])}",
    )
    ModelCard(content)  # refuses metadata that the hub would not read
    write_text(folder / "README.md", content)
    return folder
