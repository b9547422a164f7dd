"""Who may use the fleet: keys, users and tokens, in one folder of files. The commands, the token service and any other
front import it; it imports nothing of this repository."""
