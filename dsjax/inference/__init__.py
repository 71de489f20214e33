"""From trained parameters to text: the latent cache, prefill and decode programs, sampling, streaming."""
