"""Who gets a place, and when."""
