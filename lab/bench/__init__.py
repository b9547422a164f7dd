"""Peers, loads and reports of `make bench` and lab/gpu. `make chaos` takes report.py only."""
