"""What `make doctor` looks at and says, and what `make report` packs."""
