"""Quantizing a matrix for the inputs it sees: from second moments to codes, scale and tau."""
