"""Rectified flow: the path from data to noise, guidance, and ODE solvers."""
