"""Kills saves at random moments and checks what remains."""
