"""A model on devices and the CPU together: what lies where, and the order in which they compute."""
