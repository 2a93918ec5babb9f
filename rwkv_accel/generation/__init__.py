"""Text generation: batched decoding, sampling, beam search, conversations and batch jobs."""
