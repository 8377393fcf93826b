"""How free a model is: measures, judges, report."""
