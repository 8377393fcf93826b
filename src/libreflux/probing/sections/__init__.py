"""What a probe consists of: each section plans, draws or asks what it needs, and measures."""
