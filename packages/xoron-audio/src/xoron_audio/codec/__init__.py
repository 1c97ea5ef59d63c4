"""Audio to discrete ids and back: codecs for sequences of one token space."""
