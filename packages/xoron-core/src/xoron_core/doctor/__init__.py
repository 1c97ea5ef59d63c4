"""`xoron doctor`: what is installed, what this machine can run, and whether a model folder is well.

Each module yields findings; none of them changes anything. What a finding calls wrong comes with
the fix. `installed` needs no torch, `machine` and `kernels` import it, `folder` and `live` open a
model.
"""

from __future__ import annotations

from xoron_core.doctor.finding import Finding

__all__ = ["Finding"]
