"""The PyTorch half: pictures to codes, and codes to pictures."""
