"""The language model in MLX: token ids in, text or codes out."""
