"""Where tokens come from: sources, tokenizer, token cache, batches, and n-gram baselines to measure a model by."""
