"""Finding projections: closed form (``fit``) and, later, gradient training."""
