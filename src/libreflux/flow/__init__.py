"""The mathematics of rectified flow: tensors in, tensors out. Knows no model and no file; imports only torch."""
