"""From logits to tokens: greedy, sampled, and which drafts are accepted."""
