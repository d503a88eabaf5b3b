"""What is done with a trained concept, one tool a file."""
