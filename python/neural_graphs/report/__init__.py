"""The demo: its stages, measurements, plots and page."""
