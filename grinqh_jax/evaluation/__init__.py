"""Quality against bits: perplexity and KL divergence of texts, accuracy on word problems."""
