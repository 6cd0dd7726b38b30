"""An inert pickle reader and a pickle writer: nothing is imported, nothing is executed."""
