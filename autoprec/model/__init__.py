"""What a model is: layers, shapes, roles, and the options that a layer can take."""
