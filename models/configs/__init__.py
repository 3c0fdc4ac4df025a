"""The configurations of the networks, one file for each family; read by the launcher, so without torch."""
