"""How free a model is: measures on held-out pictures, judges, distances."""
