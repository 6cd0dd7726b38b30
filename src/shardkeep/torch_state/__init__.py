"""What a rank holds of a state: pieces of tensors in memory, and objects. Imports torch."""
