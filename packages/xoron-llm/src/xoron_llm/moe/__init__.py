"""The xoron-moe language model: latent or grouped-query attention and mixture-of-experts."""
