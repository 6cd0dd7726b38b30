"""Moving bytes between memory and a store, and checking them on the way."""
