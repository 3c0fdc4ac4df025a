"""task=load: clients that load an engine or a server, and their measurements."""
