"""What runs at each call of a compiled model: which step and lane it is of, and the state that its step graph gets."""
