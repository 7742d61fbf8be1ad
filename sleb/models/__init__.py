"""What a model is: where it comes from, and what its files say."""
