"""Arrays in, image out."""
