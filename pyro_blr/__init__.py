"""The Bayesian learning rule for Pyro."""
