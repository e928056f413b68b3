"""Text in, token ids; token ids in, text: tokenizer, chat templates, prompts, stop strings."""
