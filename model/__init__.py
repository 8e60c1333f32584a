"""Live Avatar's arithmetic in torch: the causal transformer, its caches, encoders, solvers, checkpoints."""
