"""How the built-in model is made: one module a stage, ``python -m llada2_mlx.shapes.training`` runs them all."""
