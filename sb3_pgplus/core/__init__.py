"""Pure functions of tensors: the mathematics of the package. Imports torch only."""
