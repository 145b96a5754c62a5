"""PowerInfer's model files and predictors as sources of a conversion."""
