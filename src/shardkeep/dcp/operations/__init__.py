"""What the drop-in's `save`, `async_save` and `load` do, on top of its classes and the bridge."""
