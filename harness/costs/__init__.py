"""Operations, traffic, memory and time of a layout in closed form."""
