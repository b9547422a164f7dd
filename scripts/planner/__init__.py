"""From GPUs and a model to a fleet that fits: `nvml` reads the host into a `machine`, with what its own replicas hold
(`ours`), `model` a config.json, `memory` and `speed` do the arithmetic, `choose` picks the layout, `render` writes it
down."""
