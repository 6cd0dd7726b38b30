"""An inert pickle reader, and a writer of pickles: nothing is imported, nothing is executed."""
