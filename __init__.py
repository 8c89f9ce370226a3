"""ComfyUI-LLaDA2-MLX: LLaDA2.0-Uni for ComfyUI on Apple Silicon."""
