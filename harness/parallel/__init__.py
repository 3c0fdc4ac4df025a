"""The ranks of a layout: their mesh, their collectives, and what applies a layout to a network from outside."""
