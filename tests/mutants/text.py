"""Faults of text components: backbone, tokenizer and fusion."""

from tests.mutants.base import Mutant


def _part(kind, name, old, new, check, *says):
    return Mutant(name, "parts.py", old, new, f"{kind}/words/{check}", says)


def _return(name):
    """The line of the correct component that gives its result back."""
    return f"        return {name}  # noqa: RET504\n"


def _output(name, new, check, *says):
    """A fault in what the backbone's forward returns."""
    return _part("backbone", name, _return("output"), new, check, *says)


TEXT = [
    _part(
        "backbone",
        "rows-missing",
        "return super().logits(hidden)",
        "return super().logits(hidden)[..., :100]",
        "backbone-shapes",
        "logits has 100 rows",
        "context.space",
    ),
    _output(
        "looks-ahead",
        "        return output._replace(hidden=output.hidden + output.hidden.roll(-1, 1))\n",
        "backbone-causal",
        "later ids change earlier positions",
    ),
    _part(
        "backbone",
        "ignores-the-cache",
        "            cache=cache,\n",
        "            cache=None,\n",
        "backbone-cache",
        "with the cache",
    ),
    _output(
        "returns-no-cache",
        "        return output._replace(cache=None)\n",
        "backbone-cache",
        "returns no cache",
    ),
    _part(
        "backbone",
        "ignores-padding",
        "            attention_mask=attention_mask,\n",
        "",
        "backbone-padding",
        "padded on the left",
    ),
    _part(
        "backbone",
        "ignores-documents",
        "            document_ids=document_ids,\n",
        "",
        "backbone-documents",
        "honours_documents = False",
    ),
    _part(
        "backbone",
        "denies-documents-and-takes-them",
        "honours_documents = True",
        "honours_documents = False",
        "backbone-documents",
        "raise a CompositionError",
    ),
    _part(
        "backbone",
        "draws-every-row",
        "super().resize_rows(rows, new_rows, generator)",
        "import torch\n\n        super().resize_rows(rows, torch.arange(rows), generator)",
        "backbone-rows",
        "`new_rows` alone",
    ),
    _part(
        "backbone",
        "forgets-its-losses",
        "return super().loss_counts(batch)",
        "return {}",
        "backbone-loss-counts",
        "balance",
    ),
    _part(
        "tokenizer",
        "wrong-base-size",
        _return("base"),
        "        import dataclasses\n\n        return dataclasses.replace(base, size=257)\n",
        "tokenizer-base",
        "says 257 ids",
    ),
    _part(
        "tokenizer",
        "owns-what-it-has-not",
        _return("base"),
        "        import dataclasses\n\n"
        "        return dataclasses.replace(base, owned={'<|mine|>': 5})\n",
        "tokenizer-base",
        "owns '<|mine|>' at 5",
    ),
    _part(
        "tokenizer",
        "loses-capitals",
        _return("tokenizer"),
        "        from tokenizers.normalizers import Lowercase\n\n"
        "        tokenizer.backend_tokenizer.normalizer = Lowercase()\n"
        "        return tokenizer\n",
        "tokenizer-round-trip",
        "comes back as",
    ),
    _part(
        "fusion",
        "half-open-gate",
        "return super().forward(hidden, memory, visible=visible, layer=layer)",
        "return super().forward(0.5 * hidden, memory, visible=visible, layer=layer)",
        "fusion-identity",
        "not the identity",
    ),
    _part(
        "fusion",
        "looks-at-everything",
        "return super().forward(hidden, memory, visible=visible, layer=layer)",
        "visible = visible.new_ones(1).expand_as(visible)\n"
        "        return super().forward(hidden, memory, visible=visible, layer=layer)",
        "fusion-visibility",
        "look at",
    ),
    _part(
        "fusion",
        "looks-at-nothing",
        "return super().forward(hidden, memory, visible=visible, layer=layer)",
        "visible = visible & (layer == 0)\n"
        "        return super().forward(hidden, memory, visible=visible, layer=layer)",
        "gradients",
        "no gradient reaches",
    ),
]
