"""What the model is called, where its weights are, and how they get there."""
