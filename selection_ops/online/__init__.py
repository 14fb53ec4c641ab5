"""Choosing online: preconditioner, metrics, filters, weights and policies; pure functions on small tensors."""
