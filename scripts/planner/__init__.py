"""From GPUs and a model to a fleet that fits: `nvml` reads the host into a `machine`, with what its own replicas hold
(`ours`); `model` reads a config.json, `quantization` and `pooling` parts of it; `memory` and `speed` do the arithmetic;
`choose` picks the layout; `render` and `replica_gpus` write it down."""
