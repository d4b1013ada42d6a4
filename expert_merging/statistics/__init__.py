"""What is gathered by running models on samples, and the methods that merge with it."""
