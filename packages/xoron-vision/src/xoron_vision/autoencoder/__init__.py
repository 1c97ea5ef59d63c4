"""Images to continuous latents and back, for generators; and the losses that train it."""
