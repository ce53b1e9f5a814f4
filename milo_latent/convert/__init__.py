"""Official checkpoints to diffusers folders."""
