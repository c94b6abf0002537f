"""Thin training: a loss, an average of the weights, a loop that resumes. The networks are diffusers'."""
