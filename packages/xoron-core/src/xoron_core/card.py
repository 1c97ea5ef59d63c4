"""The model card that goes with every folder: what it is made of and how to open it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xoron_core.model import XoronModel


def render(model: XoronModel) -> str:
    """Returns the card as Markdown. It states facts of the folder and claims nothing else."""
    from xoron_core.composer.planner import parameter_rows

    rows = "\n".join(
        f"| `{row.slot}` | `{row.component}` | {row.distribution} | {row.parameters:,} |"
        for row in parameter_rows(model)
    )
    space = "none" if model.space is None else f"{model.space.size:,} rows, `{model.space.hash}`"
    return f"""---
library_name: xoron
tags: [xoron]
---

# {model.composition.name}

Composed with xoron from these parts:

| slot | component | package | parameters |
|---|---|---|---|
{rows}

Token space: {space}. The versions it was made with stand in `xoron.lock.json`.

```python
import xoron_core

model, processor = xoron_core.load("path/to/this/folder")
```
"""
