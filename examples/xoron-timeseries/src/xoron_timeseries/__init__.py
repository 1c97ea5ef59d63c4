"""A xoron plug-in: numeric series in and out of a model."""
