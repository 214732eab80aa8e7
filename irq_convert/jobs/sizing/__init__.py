"""A size that is asked for: what every choice costs and damages, and the best choice that fits."""
