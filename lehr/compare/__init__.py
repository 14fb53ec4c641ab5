"""Microanneals: policies and selections compared at equal trained tokens from the same start, over seeds."""
