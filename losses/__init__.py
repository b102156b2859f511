"""Loss functions: pure functions of tensors, torch only."""
