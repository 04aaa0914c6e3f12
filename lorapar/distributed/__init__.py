"""Several processes of one launch (torchrun, accelerate launch), each with a device of its own."""
