"""Sharded checkpoints through Orbax: of parameters alone, and of whole runs."""
