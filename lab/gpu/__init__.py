"""The planner and the gateway on real GPUs."""
