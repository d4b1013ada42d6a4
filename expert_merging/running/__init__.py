"""Running models on samples: what is asked, what experts say, and how near a model comes to it."""
