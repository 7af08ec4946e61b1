"""Programs that train a Mixture-of-Experts language model on top of ray_deepep (nothing in ray_deepep imports this)."""
