"""Finding projections: in closed form (``fit``), and by gradients (``train``)."""
