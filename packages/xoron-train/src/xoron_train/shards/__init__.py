"""Tokenised conversations on disk: written once, trained on often, without running a codec again.

`build` writes them, `audit` examines them, `source` feeds them to a run, `migrate` moves them to
another token space. What lies in a folder is said in `record` and `rows`.
"""
