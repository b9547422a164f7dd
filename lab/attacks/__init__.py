"""Attacks on a gateway that asks for keys: what is sent, what should come back, what came."""
