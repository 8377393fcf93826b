"""What a reader sees of a probe: one HTML page, its plots, tables and sentences."""
