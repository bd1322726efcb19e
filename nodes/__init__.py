"""The graph: node schemas that call down into loaders and samplers."""
