"""What the operator commands in scripts/ share."""
