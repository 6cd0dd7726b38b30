"""Messages of a save as bytes: claims, and columns of numbers."""
