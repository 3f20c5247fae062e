"""The noise schedule and the training objective, as pure functions of tensors."""
