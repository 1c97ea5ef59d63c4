"""A test-only plug-in for 1-D signals, built on xoron-core's public interface alone."""
