"""Faults for real: each is injected into commands in processes of their own, then judged against an undisturbed run."""
