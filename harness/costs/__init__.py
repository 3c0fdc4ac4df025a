"""A cost model: operations, traffic, memory and time of a layout in closed form."""
