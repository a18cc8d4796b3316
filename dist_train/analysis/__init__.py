"""What is done with runs that have weights: evaluate, draw, compare. The trainer imports nothing of it."""
