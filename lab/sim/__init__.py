"""A fleet of simulated replicas for tests of faults, speed and scale: no GPU, no engine, no weights."""
