"""Peers, loads and reports of `make bench` and scripts/gpu_bench.py. `make chaos` takes report.py only."""
