"""Planning: what a run would take on devices that are not there."""
