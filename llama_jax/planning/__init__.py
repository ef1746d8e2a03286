"""Planning: what a run needs on TPU chips that are not here, and how long it takes."""
