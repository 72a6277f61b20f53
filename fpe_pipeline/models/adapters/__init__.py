"""What an edit has to know of a model: one module for each family, told by the class of its model."""
