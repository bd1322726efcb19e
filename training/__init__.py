"""Training of the pack's networks with accelerate."""
