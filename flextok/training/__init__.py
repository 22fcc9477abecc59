"""Training with Lightning: wiring only, the models train in a bare loop too."""
