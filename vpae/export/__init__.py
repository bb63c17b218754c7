"""The student leaves the house."""
