"""A nested state as flat names, and the markers that say how ranks share its values."""
