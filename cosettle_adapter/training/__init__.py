"""Makes projections: in closed form (``fit``) and by gradient descent (``train``)."""
