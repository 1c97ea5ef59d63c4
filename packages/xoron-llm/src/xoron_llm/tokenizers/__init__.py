"""Text tokenizers: bytes, and the Qwen2.5 vocabulary."""
