"""The xoron-moe language model: a decoder with grouped-query attention and mixture-of-experts."""
