"""What a stack of blocks keeps between evaluations, and the policies that decide when it is reused."""
