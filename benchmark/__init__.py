"""What `make bench` and `make chaos` share: peers, loads, reports."""
