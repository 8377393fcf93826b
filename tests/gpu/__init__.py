"""Tests for a machine with a card: `make test-gpu`. Without one, LIBREFLUX_TEST_DEVICE=cpu runs the same code."""
