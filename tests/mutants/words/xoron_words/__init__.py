"""A test-only plug-in: the text components of xoron-llm under other names."""
