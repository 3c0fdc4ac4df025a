"""The largest numbers that more than one key takes: far above what anybody runs, and safe in every place they reach."""

MAX_STEPS = 10_000
MAX_IMAGES = 4_096
MAX_PREVIEWS = 16
MAX_SEED = 2**63 - MAX_IMAGES - 1  # image k has seed + k
MAX_TRAINING_SEED = 2**31 - 1  # shifted by 32 bits and added to a step
MAX_GUIDANCE = 1_000
MAX_SIDE = 65_536
MAX_FRAMES = 10_000
MAX_DEGREE = 1_024
MAX_REPEATS = 100_000
MAX_WAIT_S = 604_800  # a week
MAX_WIDTH = 65_536
MAX_DEPTH = 1_000
MAX_CONNECTIONS = 100_000
MAX_NUMBER = 10_000_000_000  # of samples, words or training steps
