"""Pictures and captions → batches: sources → crops and captions → cache → order → batches."""
