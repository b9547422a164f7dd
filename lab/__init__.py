"""What measures and what breaks. Never part of a running stack."""
