"""The FLUX family, on disk and in memory."""
