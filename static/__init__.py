"""The page's files, as package data."""
