"""From GPUs and a model to a fleet that fits: `nvml` reads the host into a `machine`, `replica_processes` what its own
replicas hold of it; `config` reads a model's files into a `model`, `quantization` and `pooling` parts of it;
`memory` and `speed` do the arithmetic; `choose` picks the layout; `render` and `replica_gpus` write it down."""
