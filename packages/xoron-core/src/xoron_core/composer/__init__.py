"""From a declared composition to a model: read, plan on the meta device, build."""
