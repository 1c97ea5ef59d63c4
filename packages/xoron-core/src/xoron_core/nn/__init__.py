"""Neural blocks that two packages need, each once: norms, rotary positions, attention, MLP, MoE."""
