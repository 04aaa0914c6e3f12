"""PEFT's own tests under our layers (`make peers`); nothing here is collected by the normal run."""
