"""Tasks: data, model and recipe put together."""
