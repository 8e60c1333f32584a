"""What the video decoder has to have seen before a segment. No torch here."""

DECODER_HISTORY = 38
"""Latent frames back that the Wan decoder looks, its whole receptive field. Primed with that many, it decodes
bit-equally to one that saw everything; with one fewer it does not. A carry holds them.
"""

PRIMING_LATENTS = 7
"""Motion latents that upstream primes the decoder with where a video begins."""
