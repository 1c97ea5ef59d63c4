"""Features of an encoder to positions of a backbone."""
