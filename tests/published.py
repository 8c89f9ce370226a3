"""The published backbone's config, for tests that count, and for the rehearsal at full size."""

from llada2_mlx.checkpoint.config import BackboneConfig

BACKBONE = BackboneConfig(
    vocab_size=173568, hidden_size=2048, intermediate_size=5120, num_hidden_layers=20, num_attention_heads=16, num_key_value_heads=4,
    head_dim=128, rms_norm_eps=1e-6, rope_theta=600000, partial_rotary_factor=0.5, max_position_embeddings=8192, num_experts=256,
    num_shared_experts=1, num_experts_per_tok=8, n_group=8, topk_group=4, routed_scaling_factor=2.5, moe_intermediate_size=512,
    first_k_dense_replace=1, image_token_offset=157184,
)  # fmt: skip
