"""The parts of `scripts/gpu`: what a machine with a GPU shows, each in a process of its own."""
