"""What ranks send to each other, as bytes: columns of numbers, and claims."""
