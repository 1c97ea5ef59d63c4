"""Data sets that xoron-train brings: small real tasks to see a model learn."""
