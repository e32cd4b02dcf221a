"""The embedded default student: weights, configuration and card, as package data."""
