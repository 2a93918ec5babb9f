"""From files to batches: sources, template, tokenizer, packing, sampler, loader. Never imports the model."""
